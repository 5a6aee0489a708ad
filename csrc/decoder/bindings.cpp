// The decoder's binding. Shapes are checked here against each other; what the step reads stays
// alive with the decoder.
#include "decoder/bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bitmap/bindings.hpp"
#include "common/isa.hpp"
#include "decoder/decoder.hpp"
#include "nm/bindings.hpp"
#include "quantized/bindings.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// A linear layer of any kind. The matrix object, and with it the address of its view, stays alive.
class OwnedLinear {
 public:
  OwnedLinear(const nb::object& matrix, const std::optional<Tensor>& bias) : matrix_(matrix) {
    Tensor weight;
    if (nb::isinstance<BitmapMatrix>(matrix)) take(nb::cast<const BitmapMatrix&>(matrix));
    else if (nb::isinstance<NmMatrix>(matrix)) take(nb::cast<const NmMatrix&>(matrix));
    else if (nb::isinstance<QuantizedMatrix>(matrix))
      take(nb::cast<const QuantizedMatrix&>(matrix));
    else if (nb::try_cast(matrix, weight)) take(weight);
    else throw std::invalid_argument("decoder: a matrix of no known kind");
    if (!bias) return;
    view_.bias = bias->data<const float>("bias", {view_.packed.rows});
    bias_ = bias->owner();
  }

  // The layer, which must be (rows, cols).
  const Linear& checked(int64_t rows, int64_t cols, const char* name) const {
    if (view_.packed.rows != rows || view_.cols != cols)
      throw std::invalid_argument(std::string("decoder: ") + name + " has the wrong shape");
    return view_;
  }
  int64_t rows() const { return view_.packed.rows; }

 private:
  void take(const BitmapMatrix& m) {
    view_.packed = m.view(), view_.cols = m.cols(), view_.dense = false;
  }
  void take(const NmMatrix& m) {
    view_.nm = &m.view(), view_.packed.rows = m.view().rows, view_.cols = m.cols();
  }
  void take(const QuantizedMatrix& m) {
    view_.quantized = &m.view(), view_.packed.rows = m.view().rows, view_.cols = m.view().cols;
  }
  void take(const Tensor& weight) {
    view_.packed.rows = weight.size(0), view_.cols = weight.size(1);
    view_.packed.values = weight.floats("weight", {weight.size(0), weight.size(1)});
    view_.packed.bf16 = weight.is_bf16();
  }

  nb::object matrix_, bias_;
  Linear view_;
};

class Decoder {
 public:
  // embedding: (vocab, hidden), float32 or bfloat16; cosines, sines: (capacity, head_dim).
  Decoder(int64_t heads, int64_t kv_heads, int64_t inner, float eps, float scale,
          const Tensor& embedding, const Tensor& cosines, const Tensor& sines,
          const Tensor& final_norm, const OwnedLinear& head) {
    m_.hidden = embedding.size(1), m_.heads = heads, m_.kv_heads = kv_heads;
    m_.head_dim = cosines.size(1), m_.capacity = cosines.size(0);
    m_.inner = inner, m_.vocab = head.rows();
    for (const int64_t size :
         {m_.hidden, heads, kv_heads, m_.head_dim, inner, m_.vocab, m_.capacity})
      if (size < 1) throw std::invalid_argument("decoder: sizes are at least 1");
    if (heads % kv_heads || m_.head_dim % 2 || m_.head_dim > 512)
      throw std::invalid_argument("decoder: heads or head_dim not served");
    m_.eps = eps, m_.scale = scale;
    m_.embedding = embedding.floats("embedding", {m_.vocab, m_.hidden});
    m_.embedding_bf16 = embedding.is_bf16();
    m_.cosines = cosines.data<const float>("cosines", {m_.capacity, m_.head_dim});
    m_.sines = sines.data<const float>("sines", {m_.capacity, m_.head_dim});
    m_.final_norm = final_norm.data<const float>("norm", {m_.hidden});
    m_.head = keep(head, m_.vocab, m_.hidden, "head");
    keep({embedding, cosines, sines, final_norm});
    scratch();
  }

  // parts: q, k, v, o, gate, up, down; keys, values: the cache, float32 (kv_heads, capacity,
  // head_dim) each.
  void add_layer(const Tensor& input_norm, const Tensor& mlp_norm,
                 const std::vector<OwnedLinear>& parts, const Tensor& keys, const Tensor& values) {
    if (parts.size() != 7) throw std::invalid_argument("decoder: a layer has 7 matrices");
    const int64_t q = m_.heads * m_.head_dim, kv = m_.kv_heads * m_.head_dim;
    Layer layer;
    layer.input_norm = input_norm.data<const float>("norm", {m_.hidden});
    layer.mlp_norm = mlp_norm.data<const float>("norm", {m_.hidden});
    layer.keys = keys.data<float>("keys", {m_.kv_heads, m_.capacity, m_.head_dim});
    layer.values = values.data<float>("values", {m_.kv_heads, m_.capacity, m_.head_dim});
    layer.q = keep(parts[0], q, m_.hidden, "q");
    layer.k = keep(parts[1], kv, m_.hidden, "k");
    layer.v = keep(parts[2], kv, m_.hidden, "v");
    layer.o = keep(parts[3], m_.hidden, q, "o");
    layer.gate = keep(parts[4], m_.inner, m_.hidden, "gate");
    layer.up = keep(parts[5], m_.inner, m_.hidden, "up");
    layer.down = keep(parts[6], m_.hidden, m_.inner, "down");
    keep({input_norm, mlp_norm, keys, values});
    layers_.push_back(layer);
    m_.layers = layers_.data();
    m_.layer_count = static_cast<int64_t>(layers_.size());
  }

  void step(int64_t token, int64_t position, const Tensor& logits, int threads, int isa) {
    const auto& run = kernels<DecoderKernels>(isa);
    if (token < 0 || token >= m_.vocab || position < 0 || position >= m_.capacity || threads < 1 ||
        threads > 1024)
      throw std::invalid_argument("decoder: token or position out of range");
    m_.quantize = quantized_kernels(isa).quantize_input;
    m_.quantized_rows = quantized_kernels(isa).rows;
    m_.nm_rows = kernels<NmKernels>(isa).rows;
    run.step(m_, token, position, logits.data<float>("logits", {m_.vocab}), threads);
  }

 private:
  Linear keep(const OwnedLinear& layer, int64_t rows, int64_t cols, const char* name) {
    linears_.push_back(layer);
    return layer.checked(rows, cols, name);
  }
  void keep(std::initializer_list<Tensor> tensors) {
    for (const Tensor& tensor : tensors) owners_.push_back(tensor.owner());
  }

  void scratch() {
    const int64_t wide = m_.heads * m_.head_dim;
    const int64_t widest = std::max({m_.hidden, wide, m_.inner}), rows = std::max(widest, m_.vocab);
    const int64_t words = (widest + 63) / 64;
    constexpr int64_t kThreads = 2 * 1024;
    float* integers;
    const std::array<int64_t, 12> sizes = {m_.hidden,
                                           m_.hidden,
                                           wide,
                                           m_.kv_heads * m_.head_dim,
                                           wide,
                                           m_.inner,
                                           m_.heads * m_.capacity,
                                           rows + kThreads,
                                           rows + kThreads,
                                           words * 64 / 4 + 64,
                                           words,
                                           words};
    m_.most_rows = rows;
    float** const parts[] = {&m_.state,     &m_.normed, &m_.query,          &m_.key,
                             &m_.mixed,     &m_.gated,  &m_.scores,         &m_.sums,
                             &m_.more_sums, &integers,  &m_.integer_scales, &m_.integer_sums};
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
  std::vector<OwnedLinear> linears_;
  std::vector<nb::object> owners_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<OwnedLinear>(m, "Linear")
      .def(nb::init<const nb::object&, const std::optional<Tensor>&>());
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<int64_t, int64_t, int64_t, float, float, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const OwnedLinear&>())
      .def("add_layer", &Decoder::add_layer)
      .def("step", &Decoder::step, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
