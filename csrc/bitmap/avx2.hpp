// AVX2 path: a byte of the bitmap selects a permutation that spreads 8 packed values.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "bitmap/bitmap.hpp"
#include "common/bfloat16.hpp"

namespace gossamer {
namespace {

struct SpreadTable {
  alignas(32) int32_t lane[256][8];
  constexpr SpreadTable() : lane{} {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, next = 0; bit < 8; ++bit) lane[byte][bit] = (byte >> bit) & 1 ? next++ : 0;
  }
};
constexpr SpreadTable kSpread;

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline __m256 lanes_of(uint32_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(byte)), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
}

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <class T, int B>
void row_dot(const Word* bits, int64_t words, const T* values, const T* end, const float* x,
             int64_t x_stride, float* out) {
  __m256 sums[B];
  float rest[B] = {};
  for (int b = 0; b < B; ++b) sums[b] = _mm256_setzero_ps();
  int64_t w = 0;
  for (; w < words && end - values >= 72; ++w) {  // 64 values and one whole vector beyond
    const uint64_t word = bits[w];
    _mm_prefetch(reinterpret_cast<const char*>(values) + 1024, _MM_HINT_T0);
    for (int part = 0; part < 8; ++part) {
      const uint32_t byte = (word >> (8 * part)) & 255;
      const T* from = values + __builtin_popcountll(word & ((uint64_t{1} << (8 * part)) - 1));
      const __m256i spread =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.lane[byte]));
      const __m256 lanes = lanes_of(byte);
      const __m256 value = _mm256_and_ps(lanes, _mm256_permutevar8x32_ps(load8(from), spread));
      for (int b = 0; b < B; ++b) {
        const __m256 input =
            _mm256_and_ps(lanes, _mm256_loadu_ps(x + b * x_stride + w * 64 + part * 8));
        sums[b] = _mm256_fmadd_ps(value, input, sums[b]);
      }
    }
    values += __builtin_popcountll(word);
  }
  for (; w < words; ++w) {
    for (uint64_t m = bits[w]; m; m &= m - 1) {
      const float value = widen(*values++);
      const int64_t column = w * 64 + __builtin_ctzll(m);
      for (int b = 0; b < B; ++b) rest[b] += value * x[b * x_stride + column];
    }
  }
  for (int b = 0; b < B; ++b) out[b] = sum8(sums[b]) + rest[b];
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
  constexpr int vectors = 2 * NV;
  __m256 sums[vectors];
  for (int k = 0; k < vectors; ++k) sums[k] = _mm256_loadu_ps(y + 8 * k);
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t m = bits[w]; m; m &= m - 1) {
      const __m256 value = _mm256_set1_ps(widen(*values++));
      const float* source = xt + (w * 64 + __builtin_ctzll(m)) * 16 * NV;
      for (int k = 0; k < vectors; ++k)
        sums[k] = _mm256_fmadd_ps(value, _mm256_loadu_ps(source + 8 * k), sums[k]);
    }
  }
  for (int k = 0; k < vectors; ++k) _mm256_storeu_ps(y + 8 * k, sums[k]);
  return values;
}

}  // namespace
}  // namespace gossamer

#include "bitmap/picked.hpp"
