// Batches transposed into tiles (column, batch) and back, so that a weight meets a contiguous
// vector of the batch. Compiled once per instruction set, in its anonymous namespace.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>

#include "common/bfloat16.hpp"

namespace gossamer {
namespace {

typedef float Wide __attribute__((vector_size(64)));

inline Wide spread(const float* value) {
  const float v = *value;
  return Wide{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Wide load(const float* from) {
  Wide found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}
inline Wide load(const uint16_t* from) {
#ifdef __AVX512F__  // GCC converts the two halves and joins them
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Wide>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#else
  Halves raw;
  __builtin_memcpy(&raw, from, sizeof raw);
  return reinterpret_cast<Wide>(__builtin_convertvector(raw, Words) << 16);
#endif
}
inline void store(Wide value, float* to) { __builtin_memcpy(to, &value, sizeof value); }
// Rounds to nearest even; NaN stays NaN.
inline void store(Wide value, uint16_t* to) {
  const auto bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto odd = reinterpret_cast<Words>(value != value);
  const Halves raw =
      __builtin_convertvector((odd & ((bits >> 16) | 0x40)) | (~odd & rounded), Halves);
  __builtin_memcpy(to, &raw, sizeof raw);
}
inline void store(float value, float* to) { *to = value; }
inline void store(float value, uint16_t* to) { *to = narrow(value); }

// One of the four butterflies of a 16 x 16 transpose: exchanges the off-diagonal S x S blocks.
template <int S>
__attribute__((always_inline)) inline void butterfly(Wide (&v)[16]) {
  Words low, high;
  for (int lane = 0; lane < 16; ++lane) {
    low[lane] = lane & S ? 16 + lane - S : lane;
    high[lane] = lane & S ? 16 + lane : lane + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const Wide first = v[i], second = v[i + S];
    v[i] = __builtin_shuffle(first, second, low);
    v[i + S] = __builtin_shuffle(first, second, high);
  }
}

__attribute__((always_inline)) inline void transpose(Wide (&v)[16]) {
  butterfly<8>(v);
  butterfly<4>(v);
  butterfly<2>(v);
  butterfly<1>(v);
}

// One step of adding up 16 vectors at once: lanes without bit S take v[i], lanes with it v[i + S].
template <int S>
__attribute__((always_inline)) inline void halve(Wide (&v)[16]) {
  Words low, high;
  for (int lane = 0; lane < 16; ++lane) {
    low[lane] = lane & S ? 16 + lane - S : lane;
    high[lane] = lane & S ? 16 + lane : lane + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + S], low) + __builtin_shuffle(v[i], v[i + S], high);
}

// Lane i of the result is the sum over the lanes of v[i].
__attribute__((always_inline)) inline Wide sums_of(Wide (&v)[16]) {
  halve<8>(v);
  halve<4>(v);
  halve<2>(v);
  halve<1>(v);
  return v[0];
}

// Columns from..to of x (count rows of `cols`, at most 16), transposed into xt (cols, width), zero
// beyond count.
template <class X>
void transpose_rows(const X* x, int64_t cols, int64_t count, int64_t width, int64_t from,
                    int64_t to, float* xt) {
  int64_t j = from;
  for (; j + 16 <= to; j += 16) {
    Wide v[16];
    for (int64_t k = 0; k < 16; ++k) v[k] = k < count ? load(x + k * cols + j) : Wide{};
    transpose(v);
    for (int64_t k = 0; k < 16; ++k) store(v[k], xt + (j + k) * width);
  }
  for (; j < to; ++j)
    for (int64_t k = 0; k < 16; ++k) xt[j * width + k] = k < count ? widen(x[k * cols + j]) : 0.0f;
}

// The same for any number of rows.
template <class X>
void transpose_in(const X* x, int64_t cols, int64_t count, int64_t width, int64_t from, int64_t to,
                  float* xt) {
  for (int64_t b = 0; b < width; b += 16)
    transpose_rows(x + b * cols, cols, count - b < 16 ? count - b : 16, width, from, to, xt + b);
}

// Rows from..to of yt (rows, width) back to y (count rows of `rows`).
template <class X>
void transpose_out(X* y, int64_t rows, int64_t count, int64_t width, int64_t from, int64_t to,
                   bool relu, const float* yt) {
  const auto lowest = relu ? 0.0f : -INFINITY;
  for (int64_t b = 0; b < count; b += 16) {
    const int64_t batch = count - b < 16 ? count - b : 16;
    int64_t j = from;
    for (; j + 16 <= to; j += 16) {
      Wide v[16];
      for (int64_t k = 0; k < 16; ++k) v[k] = load(yt + (j + k) * width + b);
      transpose(v);
      for (int64_t k = 0; k < batch; ++k) {
        if (relu) v[k] = v[k] < lowest ? Wide{} : v[k];
        store(v[k], y + (b + k) * rows + j);
        __builtin_prefetch(y + (b + k) * rows + j + 64, 1, 3);
      }
    }
    for (; j < to; ++j)
      for (int64_t k = 0; k < batch; ++k) {
        const float sum = yt[j * width + b + k];
        store(sum < lowest ? 0.0f : sum, y + (b + k) * rows + j);
      }
  }
}

}  // namespace
}  // namespace gossamer
