// Portable path: walks the set bits; the compiler vectorises over the batch.
#include <cstdint>

#include "bitmap/bitmap.hpp"

namespace gossamer {
namespace {

inline float widen(float value);
inline float widen(uint16_t value);

template <class T, int B>
void row_dot(const Word* bits, int64_t words, const T* values, const T*, const float* x,
             int64_t x_stride, float* out) {
  float sums[B] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t m = bits[w]; m; m &= m - 1) {
      const int64_t column = w * 64 + __builtin_ctzll(m);
      const float value = widen(*values++);
      for (int b = 0; b < B; ++b) sums[b] += value * x[b * x_stride + column];
    }
  }
  for (int b = 0; b < B; ++b) out[b] = sums[b];
}

template <class T, int B>
void picked_dot(const uint16_t* columns, const T* values, int64_t count, const float* x,
                int64_t x_stride, float* out) {
  for (int b = 0; b < B; ++b) out[b] = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    const float value = widen(values[k]);
    for (int b = 0; b < B; ++b) out[b] += value * x[b * x_stride + columns[k]];
  }
}

template <class T>
void pair_dot(const Word* bits_a, const Word* bits_b, int64_t words, const T* a, const T* b,
              const T* end_a, const T* end_b, const float* x, float* out) {
  row_dot<T, 1>(bits_a, words, a, end_a, x, 0, out);
  row_dot<T, 1>(bits_b, words, b, end_b, x, 0, out + 1);
}

template <class T>
void expand_word(uint64_t word, const T* values, float* out) {
  for (int j = 0; j < 64; ++j) out[j] = 0.0f;
  for (; word; word &= word - 1) out[__builtin_ctzll(word)] = widen(*values++);
}

template <class T, int NV>
const T* row_axpy(const Word* bits, int64_t words, const T* values, const float* xt,
                  float* y) {
  constexpr int width = 16 * NV;
  float sums[width];
  for (int k = 0; k < width; ++k) sums[k] = y[k];
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t m = bits[w]; m; m &= m - 1) {
      const float value = widen(*values++);
      const float* source = xt + (w * 64 + __builtin_ctzll(m)) * width;
      for (int k = 0; k < width; ++k) sums[k] += value * source[k];
    }
  }
  for (int k = 0; k < width; ++k) y[k] = sums[k];
  return values;
}

}  // namespace
}  // namespace gossamer

#include "decoder/driver.hpp"

namespace gossamer {
namespace {
constexpr int kLanes = 4;    // floats in a register
constexpr int kVectors = 1;  // of 16 floats, in the widest tile of the SELL product
constexpr int kSums = 8;     // registers that hold its sums
}
}  // namespace gossamer

#include "sell/driver.hpp"
#include "limits/driver.hpp"

namespace gossamer {
void matvec_portable(const Bitmap& m, const float* x, int64_t batch, float* y, const float* bias,
                     int threads) {
  run_matvec(m, x, batch, y, bias, threads);
}
void spmm_portable(const Bitmap& m, const float* xt, int64_t tiles, int64_t width, float* yt,
                   const float* bias, int64_t* cursor, int threads) {
  run_spmm(m, xt, tiles, width, yt, bias, cursor, threads);
}
void decode_portable(const Llama& m, int64_t token, int64_t position, float* logits, int threads) {
  run_decode(m, token, position, logits, threads);
}
void sell_portable(const Sell& m, const Dense& d, const float* bias, bool relu, float* xt,
                 float* yt, int threads) {
  run_sell(m, d, bias, relu, xt, yt, threads);
}
void unpack_portable(const Bitmap& m, int64_t cols, int64_t from, int64_t to, float* out, int threads) {
  run_unpack(m, cols, from, to, out, threads);
}
float read_portable(const float* data, int64_t n, int threads) { return run_read(data, n, threads); }
float multiply_portable(int64_t steps, int threads) { return run_multiply(steps, threads); }
void dense_matvec_portable(const uint16_t* w, const float* x, int64_t rows, int64_t cols, float* y,
                           int threads) {
  run_dense_matvec(w, x, rows, cols, y, threads);
}
}  // namespace gossamer
