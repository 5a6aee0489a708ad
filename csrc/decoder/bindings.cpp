// The decoder's binding. Arrays come by address; Python keeps them alive as long as the decoder and
// has checked dtype and contiguity. Shapes are checked here against the geometry.
#include "decoder/bindings.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder/decoder.hpp"
#include "common/isa.hpp"
#include "nm/bindings.hpp"
#include "quantized/bindings.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// values, bits, row_ptr, rows, cols, stride, nnz, bf16, dense, bias; or QuantizedArgs and bias, or
// NmArgs, bias and one number that is not read
using LinearArgs = std::vector<int64_t>;
// hidden, heads, kv_heads, head_dim, inner, vocab, capacity
using Geometry = std::array<int64_t, 7>;

const float* floats(int64_t address) { return reinterpret_cast<const float*>(address); }

// Matrices whose kernels are compiled apart.
struct Kept {
  std::deque<Quantized> quantized;
  std::deque<Nm> nm;
};

Linear linear(const LinearArgs& a, int64_t rows, int64_t cols, const char* name,
              Kept& kept) {
  Linear m;
  QuantizedArgs args;
  if (a.size() == args.size() + 1) {
    std::copy(a.begin(), a.end() - 1, args.begin());
    kept.quantized.push_back(quantized_view(args));
    if (kept.quantized.back().rows != rows || kept.quantized.back().cols != cols)
      throw std::invalid_argument(std::string("decoder: ") + name + " has the wrong shape");
    m.quantized = &kept.quantized.back();
    m.packed.rows = rows, m.cols = cols;
    m.bias = floats(a.back());
    return m;
  }
  NmArgs places;
  if (a.size() == places.size() + 1) {
    std::copy(a.begin(), a.end() - 1, places.begin());
    kept.nm.push_back(nm_view(places));
    if (places[2] != rows || places[3] != cols)
      throw std::invalid_argument(std::string("decoder: ") + name + " has the wrong shape");
    m.nm = &kept.nm.back();
    m.packed.rows = rows, m.cols = cols;
    m.bias = floats(a[places.size()]);
    return m;
  }
  if (a.size() != 11) throw std::invalid_argument("decoder: a layer of no known kind");
  if (a[3] != rows || a[4] != cols)
    throw std::invalid_argument(std::string("decoder: ") + name + " has the wrong shape");
  m.packed.values = reinterpret_cast<const void*>(a[0]);
  m.packed.bits = reinterpret_cast<const uint8_t*>(a[1]);
  m.packed.row_ptr = reinterpret_cast<const int64_t*>(a[2]);
  m.packed.rows = rows;
  m.packed.stride = a[5];
  m.packed.nnz = a[6];
  m.packed.bf16 = a[7] != 0;
  m.dense = a[8] != 0;
  m.cols = cols;
  m.bias = floats(a[9]);
  m.packed.columns = reinterpret_cast<const uint16_t*>(a[10]);
  if (m.dense) return m;
  if (m.packed.stride != (cols + 63) / 64 * 8 || m.packed.row_ptr[0] != 0 ||
      m.packed.row_ptr[rows] != m.packed.nnz)
    throw std::invalid_argument(std::string("decoder: ") + name + " has a wrong bitmap");
  return m;
}

class Decoder {
 public:
  Decoder(const Geometry& g, float eps, float scale, uintptr_t embedding, bool embedding_bf16,
          uintptr_t cosines, uintptr_t sines, uintptr_t final_norm, const LinearArgs& head) {
    for (const int64_t size : g)
      if (size < 1) throw std::invalid_argument("decoder: sizes are at least 1");
    if (g[1] % g[2] || g[3] % 2 || g[3] > 512)
      throw std::invalid_argument("decoder: heads or head_dim not served");
    m_.hidden = g[0], m_.heads = g[1], m_.kv_heads = g[2], m_.head_dim = g[3];
    m_.inner = g[4], m_.vocab = g[5], m_.capacity = g[6];
    m_.eps = eps, m_.scale = scale;
    m_.embedding = reinterpret_cast<const void*>(embedding);
    m_.embedding_bf16 = embedding_bf16;
    m_.cosines = reinterpret_cast<const float*>(cosines);
    m_.sines = reinterpret_cast<const float*>(sines);
    m_.final_norm = reinterpret_cast<const float*>(final_norm);
    m_.head = linear(head, m_.vocab, m_.hidden, "head", kept_);
    scratch();
  }

  // norms: input and mlp; cache: keys and values, (kv_heads, capacity, head_dim) float32 each.
  void add_layer(uintptr_t input_norm, uintptr_t mlp_norm, const std::vector<LinearArgs>& parts,
                 uintptr_t keys, uintptr_t values) {
    if (parts.size() != 7) throw std::invalid_argument("decoder: a layer has 7 matrices");
    const int64_t q = m_.heads * m_.head_dim, kv = m_.kv_heads * m_.head_dim;
    Layer layer;
    layer.input_norm = reinterpret_cast<const float*>(input_norm);
    layer.mlp_norm = reinterpret_cast<const float*>(mlp_norm);
    layer.q = linear(parts[0], q, m_.hidden, "q", kept_);
    layer.k = linear(parts[1], kv, m_.hidden, "k", kept_);
    layer.v = linear(parts[2], kv, m_.hidden, "v", kept_);
    layer.o = linear(parts[3], m_.hidden, q, "o", kept_);
    layer.gate = linear(parts[4], m_.inner, m_.hidden, "gate", kept_);
    layer.up = linear(parts[5], m_.inner, m_.hidden, "up", kept_);
    layer.down = linear(parts[6], m_.hidden, m_.inner, "down", kept_);
    layer.keys = reinterpret_cast<float*>(keys);
    layer.values = reinterpret_cast<float*>(values);
    layers_.push_back(layer);
    m_.layers = layers_.data();
    m_.layer_count = static_cast<int64_t>(layers_.size());
  }

  void step(int64_t token, int64_t position, uintptr_t logits, int threads, int isa) {
    check_isa(isa);
    if (token < 0 || token >= m_.vocab || position < 0 || position >= m_.capacity || threads < 1 ||
        threads > 1024)
      throw std::invalid_argument("decoder: token or position out of range");
    DecodeStep run = decode_portable;
#if defined(__x86_64__)
    if (isa == kAvx512) run = decode_avx512;
    if (isa == kAvx2) run = decode_avx2;
#endif
    m_.quantize = pick_quantize_input(isa);
    m_.quantized_rows = pick_quantized_rows(isa);
    m_.nm_rows = pick_nm_rows(isa);
    run(m_, token, position, reinterpret_cast<float*>(logits), threads);
  }

 private:
  void scratch() {
    const int64_t wide = m_.heads * m_.head_dim;
    const int64_t widest = std::max({m_.hidden, wide, m_.inner}), rows = std::max(widest, m_.vocab);
    const int64_t words = (widest + 63) / 64;
    constexpr int64_t kThreads = 2 * 1024;
    float* integers;
    const std::array<int64_t, 12> sizes = {
        m_.hidden, m_.hidden, wide, m_.kv_heads * m_.head_dim, wide, m_.inner,
        m_.heads * m_.capacity, rows + kThreads, rows + kThreads, words * 64 / 4 + 64, words, words};
    m_.most_rows = rows;
    float** const parts[] = {&m_.state,  &m_.normed, &m_.query,     &m_.key,
                             &m_.mixed,  &m_.gated,  &m_.scores,    &m_.sums,
                             &m_.more_sums, &integers, &m_.integer_scales, &m_.integer_sums};
    int64_t total = 16;
    for (const int64_t size : sizes) total += (size + 511) / 512 * 512;
    memory_ = std::make_unique<float[]>(total);
    auto at = reinterpret_cast<uintptr_t>(memory_.get());
    at += (64 - at % 64) % 64;
    for (size_t k = 0; k < sizes.size(); ++k) {
      *parts[k] = reinterpret_cast<float*>(at);
      at += (sizes[k] + 511) / 512 * 512 * sizeof(float);
    }
    m_.integers = reinterpret_cast<int8_t*>(integers);
  }

  Llama m_{};
  std::vector<Layer> layers_;
  Kept kept_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<const Geometry&, float, float, uintptr_t, bool, uintptr_t, uintptr_t, uintptr_t,
                    const LinearArgs&>())
      .def("add_layer", &Decoder::add_layer)
      .def("step", &Decoder::step, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
