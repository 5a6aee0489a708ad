// Python bindings. Arrays come by address and count: the Python side owns and keeps them, has
// checked dtype and contiguity, and every size is checked here against the shape.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "active/bindings.hpp"
#include "bitmap/bitmap.hpp"
#include "blocks/bindings.hpp"
#include "csr/bindings.hpp"
#include "decoder/bindings.hpp"
#include "sell/bindings.hpp"
#include "common/isa.hpp"
#include "limits/limits.hpp"
#include "nm/bindings.hpp"
#include "quantized/bindings.hpp"
#include "conv/bindings.hpp"
#include "spgemm/bindings.hpp"
#include "statistics/bindings.hpp"

namespace nb = nanobind;
using namespace gossamer;

namespace {

Bitmap view(uintptr_t bits, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t stride,
            int64_t nnz, bool bf16, uintptr_t columns = 0) {
  if (rows < 0 || stride < 0 || stride % 8 || nnz < 0)
    throw std::invalid_argument("bitmap: negative or misaligned size");
  const auto* offsets = reinterpret_cast<const int64_t*>(row_ptr);
  if (offsets[0] != 0 || offsets[rows] != nnz)
    throw std::invalid_argument("bitmap: row offsets do not end at the number of values");
  return {reinterpret_cast<const uint8_t*>(bits), reinterpret_cast<const void*>(values), offsets,
          rows, stride, nnz, bf16, reinterpret_cast<const uint16_t*>(columns)};
}

Matvec pick_matvec(int isa) {
#if defined(__x86_64__)
  if (isa == kAvx512) return matvec_avx512;
  if (isa == kAvx2) return matvec_avx2;
#endif
  return matvec_portable;
}

Spmm pick_spmm(int isa) {
#if defined(__x86_64__)
  if (isa == kAvx512) return spmm_avx512;
  if (isa == kAvx2) return spmm_avx2;
#endif
  return spmm_portable;
}

// Offsets of each row's values, from the bitmap; throws where padding bits are set.
void offsets(uintptr_t bits, int64_t rows, int64_t cols, int64_t stride, uintptr_t out) {
  const auto* byte = reinterpret_cast<const uint8_t*>(bits);
  auto* row_ptr = reinterpret_cast<int64_t*>(out);
  row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const Word* words = reinterpret_cast<const Word*>(byte + r * stride);
    int64_t count = 0;
    for (int64_t w = 0; w < stride / 8; ++w) {
      const int64_t left = cols - w * 64;
      const uint64_t allowed = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      if (words[w] & ~allowed) throw std::invalid_argument("bitmap: a padding bit is set");
      count += __builtin_popcountll(words[w]);
    }
    row_ptr[r + 1] = row_ptr[r] + count;
  }
}

// The column of every value, from the bitmap; stride is of at most 65536 columns.
void columns(uintptr_t bits, uintptr_t row_ptr, int64_t rows, int64_t stride, int64_t nnz,
             uintptr_t out) {
  if (stride > 65536 / 8) throw std::invalid_argument("bitmap: too many columns for 16 bits");
  const Bitmap m = view(bits, 0, row_ptr, rows, stride, nnz, false);
  for (int64_t r = 0; r < rows; ++r) {
    auto* column = reinterpret_cast<uint16_t*>(out) + m.row_ptr[r];
    const Word* words = reinterpret_cast<const Word*>(m.bits + r * stride);
    int64_t count = 0;
    for (int64_t w = 0; w < stride / 8; ++w) count += __builtin_popcountll(words[w]);
    if (m.row_ptr[r] + count != m.row_ptr[r + 1])
      throw std::invalid_argument("bitmap: row offsets are of another bitmap");
    for (int64_t w = 0; w < stride / 8; ++w)
      for (uint64_t left = words[w]; left; left &= left - 1)
        *column++ = static_cast<uint16_t>(w * 64 + __builtin_ctzll(left));
  }
}

float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even; NaN stays NaN.
uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x (batch, cols) and y (batch, rows), both float32 or both bfloat16; bias float32. Converts and
// pads here, because small layers are called so often that every tensor operation around the
// kernel would cost more than the kernel.
void matvec(uintptr_t bits, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t stride,
            int64_t nnz, bool bf16, uintptr_t columns, uintptr_t x, int64_t cols, int64_t batch,
            bool x_bf16, uintptr_t y, uintptr_t bias, int threads, int isa) {
  check_isa(isa);
  if (batch < 1 || batch > 8 || threads < 1 || cols < 0 || cols > stride * 8)
    throw std::invalid_argument("bitmap: bad batch");
  const Bitmap m = view(bits, values, row_ptr, rows, stride, nnz, bf16, columns);
  const int64_t padded = stride * 8;
  const auto* input = reinterpret_cast<const float*>(x);
  auto* output = reinterpret_cast<float*>(y);
  thread_local std::vector<float> wide, sums;
  if (x_bf16 || padded != cols || x % 64) {
    wide.assign(batch * padded + 16, 0.0f);
    float* aligned = wide.data() + (64 - reinterpret_cast<uintptr_t>(wide.data()) % 64) / 4 % 16;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < cols; ++j)
        aligned[b * padded + j] = x_bf16
            ? from_bf16(reinterpret_cast<const uint16_t*>(x)[b * cols + j])
            : input[b * cols + j];
    input = aligned;
  }
  if (x_bf16) {
    sums.resize(batch * rows);
    output = sums.data();
  }
  pick_matvec(isa)(m, input, batch, output, reinterpret_cast<const float*>(bias), threads);
  if (x_bf16)
    for (int64_t i = 0; i < batch * rows; ++i)
      reinterpret_cast<uint16_t*>(y)[i] = to_bf16(output[i]);
}

void spmm(uintptr_t bits, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t stride,
          int64_t nnz, bool bf16, uintptr_t xt, int64_t tiles, int64_t width, uintptr_t yt,
          uintptr_t bias, uintptr_t cursor, int threads, int isa) {
  check_isa(isa);
  if (tiles < 0 || width % 16 || width < 16 || width > 64 || threads < 1)
    throw std::invalid_argument("bitmap: bad tiles");
  const Bitmap m = view(bits, values, row_ptr, rows, stride, nnz, bf16);
  pick_spmm(isa)(m, reinterpret_cast<const float*>(xt), tiles, width,
                 reinterpret_cast<float*>(yt), reinterpret_cast<const float*>(bias),
                 reinterpret_cast<int64_t*>(cursor), threads);
}

void unpack(uintptr_t bits, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t stride,
            int64_t nnz, bool bf16, int64_t cols, int64_t from, int64_t to, uintptr_t out,
            int threads, int isa) {
  check_isa(isa);
  if (from < 0 || to < from || to > rows || cols < 0 || cols > stride * 8 || threads < 1)
    throw std::invalid_argument("bitmap: bad rows");
  const Bitmap m = view(bits, values, row_ptr, rows, stride, nnz, bf16);
  Unpack run = unpack_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = unpack_avx512;
  if (isa == kAvx2) run = unpack_avx2;
#endif
  run(m, cols, from, to, reinterpret_cast<float*>(out), threads);
}

float read_floats(uintptr_t data, int64_t n, int threads, int isa) {
  check_isa(isa);
  if (n < 0 || n % 64 || threads < 1) throw std::invalid_argument("limits: bad size");
  const auto* from = reinterpret_cast<const float*>(data);
#if defined(__x86_64__)
  if (isa == kAvx512) return read_avx512(from, n, threads);
  if (isa == kAvx2) return read_avx2(from, n, threads);
#endif
  return read_portable(from, n, threads);
}

float multiply(int64_t steps, int threads, int isa) {
  check_isa(isa);
  if (steps < 0 || threads < 1) throw std::invalid_argument("limits: bad size");
#if defined(__x86_64__)
  if (isa == kAvx512) return multiply_avx512(steps, threads);
  if (isa == kAvx2) return multiply_avx2(steps, threads);
#endif
  return multiply_portable(steps, threads);
}

void dense_matvec(uintptr_t w, uintptr_t x, int64_t rows, int64_t cols, uintptr_t y, int threads,
                  int isa) {
  check_isa(isa);
  if (rows < 0 || cols < 0 || cols % 64 || threads < 1)
    throw std::invalid_argument("limits: bad size");
  auto run = dense_matvec_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = dense_matvec_avx512;
  if (isa == kAvx2) run = dense_matvec_avx2;
#endif
  run(reinterpret_cast<const uint16_t*>(w), reinterpret_cast<const float*>(x), rows, cols,
      reinterpret_cast<float*>(y), threads);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels; call them through gossamer.ops.";
  m.def("best_isa", &best_isa);
  m.def("bitmap_offsets", &offsets, nb::call_guard<nb::gil_scoped_release>());
  m.def("bitmap_columns", &columns, nb::call_guard<nb::gil_scoped_release>());
  m.def("bitmap_matvec", &matvec, nb::call_guard<nb::gil_scoped_release>());
  bind_decoder(m);
  bind_sell(m);
  bind_quantized(m);
  bind_blocks(m);
  bind_csr(m);
  bind_nm(m);
  bind_active(m);
  bind_spgemm(m);
  bind_conv(m);
  bind_statistics(m);
  m.def("bitmap_unpack", &unpack, nb::call_guard<nb::gil_scoped_release>());
  m.def("read_floats", &read_floats, nb::call_guard<nb::gil_scoped_release>());
  m.def("dense_matvec", &dense_matvec, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiply", &multiply, nb::call_guard<nb::gil_scoped_release>());
  m.attr("FLOPS_PER_STEP") = kFlopsPerStep;
  m.def("bitmap_spmm", &spmm, nb::call_guard<nb::gil_scoped_release>());
}
