// Binding of the quantised matrices. Arrays come by address; Python keeps them alive and has checked
// dtype and contiguity. Sizes are checked here.
#include "quantized/bindings.hpp"

#include <nanobind/stl/array.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even; NaN stays NaN.
uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T* aligned(std::vector<T>& memory, int64_t count) {
  memory.resize(count + 64 / sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>(at + (64 - at % 64) % 64);
}

#if defined(__x86_64__)
#define GOSSAMER_PICK(name, isa) \
  (isa == kAvx512 && has_vnni() ? name##_avx512 : isa >= kAvx2 ? name##_avx2 : name##_portable)
#else
#define GOSSAMER_PICK(name, isa) ((void)isa, name##_portable)
#endif

// x (batch, cols) and y (batch, rows), both float32 or both bfloat16; bias float32 or 0.
void matvec(const QuantizedArgs& args, uintptr_t x, int64_t batch, bool bf16, uintptr_t y,
            uintptr_t bias, int threads, int isa) {
  check_isa(isa);
  if (batch < 1 || batch > 8 || threads < 1) throw std::invalid_argument("quantized: bad batch");
  const Quantized m = quantized_view(args);
  thread_local std::vector<float> wide, scales, totals, sums;
  thread_local std::vector<int8_t> values;
  const int64_t padded = m.words * 64, pairs = pairs_of(m.words);
  auto* input = reinterpret_cast<const float*>(x);
  if (bf16) {
    wide.resize(batch * m.cols);
    for (int64_t i = 0; i < batch * m.cols; ++i)
      wide[i] = widen(reinterpret_cast<const uint16_t*>(x)[i]);
    input = wide.data();
  }
  int8_t* q = aligned(values, batch * padded);
  scales.resize(batch * pairs);
  totals.resize(batch * m.words);
  QuantInput inputs[8];
  for (int64_t b = 0; b < batch; ++b) {
    inputs[b] = {input + b * m.cols, q + b * padded, scales.data() + b * pairs,
                 totals.data() + b * m.words};
    pick_quantize_input(isa)(input + b * m.cols, m.cols, 0, pairs, q + b * padded,
                             scales.data() + b * pairs, totals.data() + b * m.words);
  }
  auto* output = reinterpret_cast<float*>(y);
  if (bf16) {
    sums.resize(batch * m.rows);
    output = sums.data();
  }
  GOSSAMER_PICK(quantized_matvec, isa)
  (m, inputs, batch, output, reinterpret_cast<const float*>(bias), threads);
  if (bf16)
    for (int64_t i = 0; i < batch * m.rows; ++i)
      reinterpret_cast<uint16_t*>(y)[i] = narrow(output[i]);
}

void unpack(const QuantizedArgs& args, int64_t from, int64_t to, uintptr_t out, int threads,
            int isa) {
  check_isa(isa);
  const Quantized m = quantized_view(args);
  if (from < 0 || to < from || to > m.rows || threads < 1)
    throw std::invalid_argument("quantized: bad rows");
  GOSSAMER_PICK(quantized_unpack, isa)(m, from, to, reinterpret_cast<float*>(out), threads);
}

// out: bytes of the dense integers, as many as rows and words ask for.
void fill(const QuantizedArgs& args, uintptr_t out, int64_t bytes, int threads, int isa) {
  check_isa(isa);
  const Quantized m = quantized_view(args);
  const int64_t shared = m.bits == 4 ? (m.rows + 1) / 2 : m.rows;
  if (bytes != shared * m.words * 64 || threads < 1)
    throw std::invalid_argument("quantized: bad number of bytes to fill");
  GOSSAMER_PICK(quantized_fill, isa)(m, reinterpret_cast<uint8_t*>(out), threads);
}

// x (batch, cols) and y (batch, rows), float32; bias float32 or 0. Only where `has_vnni`.
void matmul(const QuantizedArgs& args, uintptr_t x, int64_t batch, uintptr_t y, uintptr_t bias,
            int threads) {
  const Quantized m = quantized_view(args);
  if (batch < 1 || threads < 1) throw std::invalid_argument("quantized: bad batch");
#if defined(__x86_64__)
  if (best_isa() == kAvx512 && has_vnni())
    return quantized_matmul_avx512(m, reinterpret_cast<const float*>(x), batch,
                                   reinterpret_cast<float*>(y),
                                   reinterpret_cast<const float*>(bias), threads);
#endif
  throw std::invalid_argument("quantized: this processor lacks byte dot products");
}

}  // namespace

Quantized quantized_view(const QuantizedArgs& a) {
  Quantized m{};
  m.values = reinterpret_cast<const uint8_t*>(a[0]);
  m.offsets = reinterpret_cast<const int64_t*>(a[1]);
  m.bitmap = reinterpret_cast<const Word*>(a[2]);
  m.scales = reinterpret_cast<const uint16_t*>(a[3]);
  m.zeros = reinterpret_cast<const uint8_t*>(a[4]);
  m.outlier_ptr = reinterpret_cast<const int64_t*>(a[5]);
  m.outlier_cols = reinterpret_cast<const int32_t*>(a[6]);
  m.outlier_values = reinterpret_cast<const float*>(a[7]);
  m.rows = a[8], m.cols = a[9], m.words = (m.cols + 63) / 64;
  if (m.rows < 0 || m.cols < 0 || a[10] < 0 || a[10] > 32 || (a[11] != 4 && a[11] != 8))
    throw std::invalid_argument("quantized: bad shape, group or bits");
  m.group_shift = static_cast<int>(a[10]), m.bits = static_cast<int>(a[11]);
  m.run = static_cast<int>(a[14]);
  if (m.run && ((m.run != 4 && m.run != 8) || m.cols % 64 || !m.bitmap))
    throw std::invalid_argument("quantized: bad run");
  m.groups = (m.words + (int64_t{1} << m.group_shift) - 1) >> m.group_shift;
  const int64_t shared = m.bits == 4 ? (m.rows + 1) / 2 : m.rows;
  if (m.offsets[0] != 0 || m.offsets[shared] + kSlack != a[12])
    throw std::invalid_argument("quantized: offsets do not end at the number of bytes");
  if (m.outlier_ptr && (m.outlier_ptr[0] != 0 || m.outlier_ptr[m.rows] != a[13]))
    throw std::invalid_argument("quantized: outlier offsets do not end at their number");
  return m;
}

QuantizeInput pick_quantize_input(int isa) { return GOSSAMER_PICK(quantize_input, isa); }
QuantizedRows pick_quantized_rows(int isa) { return GOSSAMER_PICK(quantized_rows, isa); }

void bind_quantized(nb::module_& m) {
  m.def("quantized_matvec", &matvec, nb::call_guard<nb::gil_scoped_release>());
  m.def("quantized_matmul", &matmul, nb::call_guard<nb::gil_scoped_release>());
  m.def("quantized_unpack", &unpack, nb::call_guard<nb::gil_scoped_release>());
  m.def("quantized_fill", &fill, nb::call_guard<nb::gil_scoped_release>());
  m.def("has_vnni", &has_vnni);
}

}  // namespace gossamer
