// Dot products of bfloat16 for few queries: two channels of a key, or two keys of a channel, at a
// time. Weights are rounded to bfloat16, as in the forward pass.
#pragma once
#include <immintrin.h>

#include "attention/chunks.hpp"

namespace gossamer {
namespace {

constexpr int64_t kWidest = 256;  // of heads that are served so

inline __m512bh thirty_two(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }

// The queries as bfloat16, which they were.
template <int R>
void pack_pairs(const float* queries, int64_t step, int64_t width, uint16_t (&to)[R][kWidest]) {
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < width; j += 16) {
      const auto pairs = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(queries + r * step + j));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to[r] + j), pairs);
    }
}

// As `dots`, for a multiple of 32 channels.
template <int R, int N>
__attribute__((always_inline)) inline Wide pair_dots(const uint16_t (&queries)[R][kWidest],
                                                     const uint16_t* const* rows, int count,
                                                     int64_t width) {
  constexpr int T = 4;
  __m512 v[16] = {};
#pragma GCC unroll 4
  for (int i = 0; i < N; i += T) {
    if (i >= count) continue;
    const uint16_t* some[T];
    for (int k = 0; k < T; ++k) some[k] = rows[i + k < count ? i + k : 0];
    for (int64_t j = 0; j < width; j += 32) {
      __m512bh query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = thirty_two(queries[r] + j);
#pragma GCC unroll 4
      for (int k = 0; k < T; ++k) {
        const __m512bh x = thirty_two(some[k] + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          v[(i + k) * R + r] = _mm512_dpbf16_ps(v[(i + k) * R + r], query[r], x);
      }
    }
  }
  Wide found[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) found[k] = v[k];
  return sums_of(found);
}

// Channels 0..31 of sums, as unpacking two rows orders them, and back.
inline void take_pairs(const float* from, __m512 (&sums)[2]) {
  const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
  sums[0] = _mm512_shuffle_f32x4(first, second, 0x88);
  sums[1] = _mm512_shuffle_f32x4(first, second, 0xdd);
}
inline void put_pairs(const __m512 (&sums)[2], float* to) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(sums[0], low, sums[1]));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(sums[0], high, sums[1]));
}

// The sums of R rows, from channel `at` 32 * C of them, += the weighted values of `count` keys. An
// odd last key stands beside itself with weight 0. Half of what is ahead is fetched.
template <int R, int C, class Ahead>
void add_pairs(const uint32_t (&weights)[R][kChunk / 2], const uint16_t* const* values, int count,
               int64_t at, float* sums, int64_t gap, const Ahead& ahead) {
  __m512 s[R][C][2];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) take_pairs(sums + r * gap + at + 32 * c, s[r][c]);
  for (int k = 0; k < count; k += 2) {
    ahead((kChunk + k) / 2, (kChunk + k) / 2 + 1);
    const uint16_t *first = values[k] + at, *second = values[k + 1 < count ? k + 1 : k] + at;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m512i a = _mm512_loadu_si512(first + 32 * c), b = _mm512_loadu_si512(second + 32 * c);
      const auto low = (__m512bh)_mm512_unpacklo_epi16(a, b);
      const auto high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[r][k / 2]));
        s[r][c][0] = _mm512_dpbf16_ps(s[r][c][0], weight, low);
        s[r][c][1] = _mm512_dpbf16_ps(s[r][c][1], weight, high);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) put_pairs(s[r][c], sums + r * gap + at + 32 * c);
}

// Weights as pairs; false where one is 0, which must meet no value that is infinite or NaN.
template <int R>
bool pair_weights(const float (&weights)[R][kChunk], int count, uint32_t (&pairs)[R][kChunk / 2]) {
  __mmask16 zero = 0;
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < count; k += 16) {
      const auto there = static_cast<__mmask16>(count - k < 16 ? (1 << (count - k)) - 1 : 0xffff);
      const __m512 w = _mm512_maskz_loadu_ps(there, weights[r] + k);
      zero |= _mm512_mask_cmp_ps_mask(there, w, _mm512_setzero_ps(), _CMP_EQ_OQ);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs[r] + k / 2),
                          (__m256i)_mm512_cvtneps_pbh(w));
    }
  return !zero;
}

}  // namespace
}  // namespace gossamer
