// Portable path: walks the set bits; the compiler vectorises over the batch.
#pragma once
#include <cstdint>

#include "bitmap/bitmap.hpp"
#include "common/bfloat16.hpp"

namespace gossamer {
namespace {

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
const T* row_axpy(const Word* bits, int64_t words, const T* values, const float* xt, float* y) {
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
