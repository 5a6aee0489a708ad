// AVX-512 path (F, BW, DQ, VL): 16 bits of the bitmap are an expand mask for 16 packed values.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "bitmap/bitmap.hpp"
#include "common/bfloat16.hpp"

namespace gossamer {
namespace {

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
// Faults on masked-off lanes are suppressed, so the end of the array is safe.
inline __m512 load16(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline __m512 load16(const uint16_t* p, int count) {
  const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

template <class T, int B>
void row_dot(const Word* bits, int64_t words, const T* values, const T* end, const float* x,
             int64_t x_stride, float* out) {
  constexpr int kChains = B == 1   ? 2
                          : B == 2 ? 4
                                   : 1;  // independent sums hide the latency of fused multiply-add
  __m512 sums[B][kChains];
  for (int b = 0; b < B; ++b)
    for (int c = 0; c < kChains; ++c) sums[b][c] = _mm512_setzero_ps();
  int64_t w = 0;
  for (; w < words && end - values >= 80; ++w) {  // 64 values and one whole vector beyond
    const uint64_t word = bits[w];
    const auto* masks = reinterpret_cast<const uint16_t*>(bits + w);
    _mm_prefetch(reinterpret_cast<const char*>(values) + 4096, _MM_HINT_T0);
    for (int part = 0; part < 4; ++part) {
      __mmask16 mask;  // loaded, not shifted out of the word: one instruction less per part
      __builtin_memcpy(&mask, masks + part, sizeof mask);
      const T* from = values + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
      const __m512 value = _mm512_maskz_expand_ps(mask, load16(from));
      for (int b = 0; b < B; ++b) {
        const __m512 input = _mm512_load_ps(x + b * x_stride + w * 64 + part * 16);
        __m512& sum = sums[b][part % kChains];
        sum = _mm512_mask3_fmadd_ps(value, input, sum, mask);
      }
    }
    values += __builtin_popcountll(word);
  }
  for (; w < words; ++w) {
    for (int part = 0; part < 4; ++part) {
      const __mmask16 mask = static_cast<__mmask16>(bits[w] >> (16 * part));
      const int count = __builtin_popcount(mask);
      const __m512 value = _mm512_maskz_expand_ps(mask, load16(values, count));
      values += count;
      for (int b = 0; b < B; ++b) {
        const __m512 input = _mm512_load_ps(x + b * x_stride + w * 64 + part * 16);
        __m512& sum = sums[b][part % kChains];
        sum = _mm512_mask3_fmadd_ps(value, input, sum, mask);
      }
    }
  }
  for (int b = 0; b < B; ++b) {
    __m512 total = sums[b][0];
    for (int c = 1; c < kChains; ++c) total = _mm512_add_ps(total, sums[b][c]);
    out[b] = _mm512_reduce_add_ps(total);
  }
}

// The expand masks of a word's four parts. A mask loaded from memory takes a turn of port 5, which
// widening and expanding keep busy; one made of sign bits takes two turns of port 0. Two of each
// are fastest; where more rows of x keep port 0 busy, none of these.
inline void load_masks(const Word* word, __mmask16 (&masks)[4]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int32_t half;
  __builtin_memcpy(&half, word, sizeof half);
  const __m512i all = _mm512_set1_epi32(half);
  for (int part = 0; part < 2; ++part) {
    const __m512i left = _mm512_sub_epi32(_mm512_set1_epi32(31 - 16 * part), lane);
    masks[part] = _mm512_movepi32_mask(_mm512_sllv_epi32(all, left));
  }
  // Written out, since compilers go by way of a general register.
  typedef uint16_t __attribute__((may_alias)) Part;
  const auto* parts = reinterpret_cast<const Part*>(word);
  for (int part = 2; part < 4; ++part) asm("kmovw %1, %0" : "=Yk"(masks[part]) : "m"(parts[part]));
}

// Adds a word's columns to the sums; returns where the next word's values are. Reads 64 values and
// one whole vector beyond, whatever the word keeps.
template <class T>
__attribute__((always_inline)) inline const T* add_word(const Word* bits, const T* values,
                                                        const float* x, __m512 (&sums)[2]) {
  const uint64_t word = *bits;
  __mmask16 masks[4];
  load_masks(bits, masks);
  for (int part = 0; part < 4; ++part) {
    const T* from = values + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
    const __m512 value = _mm512_maskz_expand_ps(masks[part], load16(from));
    __m512& sum = sums[part % 2];
    sum = _mm512_mask3_fmadd_ps(value, _mm512_load_ps(x + part * 16), sum, masks[part]);
  }
  return values + __builtin_popcountll(word);
}

// The same without reading past the values that the word keeps.
template <class T>
__attribute__((always_inline)) inline const T* add_last_word(uint64_t word, const T* values,
                                                             const float* x, __m512 (&sums)[2]) {
  for (int part = 0; part < 4; ++part) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * part));
    const int count = __builtin_popcount(mask);
    const __m512 value = _mm512_maskz_expand_ps(mask, load16(values, count));
    __m512& sum = sums[part % 2];
    sum = _mm512_mask3_fmadd_ps(value, _mm512_load_ps(x + part * 16), sum, mask);
    values += count;
  }
  return values;
}

// Of `words` so many that add_word may take, whatever they keep, `left` values before the end.
inline int64_t safe_words(int64_t left, int64_t words) {
  const int64_t safe = (left - 16) / 64;
  return safe < words ? safe : words;
}

// Two rows at once, from two places of the matrix: twice as many streams from memory are in flight.
// Adds in the order of row_dot<T, 1>, bit for bit.
template <class T>
void pair_dot(const Word* bits_a, const Word* bits_b, int64_t words, const T* a, const T* b,
              const T* end_a, const T* end_b, const float* x, float* out) {
  __m512 sums_a[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 sums_b[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t w = 0;
  for (int64_t n; (n = safe_words(end_a - a, safe_words(end_b - b, words - w))) > 0;) {
    for (const int64_t to = w + n; w < to; ++w) {
      _mm_prefetch(reinterpret_cast<const char*>(a) + 2048, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(b) + 2048, _MM_HINT_T0);
      a = add_word(bits_a + w, a, x + w * 64, sums_a);
      b = add_word(bits_b + w, b, x + w * 64, sums_b);
    }
  }
  for (; w < words; ++w) {
    a = add_last_word(bits_a[w], a, x + w * 64, sums_a);
    b = add_last_word(bits_b[w], b, x + w * 64, sums_b);
  }
  out[0] = _mm512_reduce_add_ps(_mm512_add_ps(sums_a[0], sums_a[1]));
  out[1] = _mm512_reduce_add_ps(_mm512_add_ps(sums_b[0], sums_b[1]));
}

// The 64 positions of a word, zeros where it keeps nothing.
template <class T>
void expand_word(uint64_t word, const T* values, float* out) {
  for (int part = 0; part < 4; ++part) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * part));
    const int count = __builtin_popcount(mask);
    _mm512_storeu_ps(out + 16 * part, _mm512_maskz_expand_ps(mask, load16(values, count)));
    values += count;
  }
}

template <class T, int NV>
const T* row_axpy(const Word* bits, int64_t words, const T* values, const float* xt, float* y) {
  constexpr int64_t width = 16 * NV;
  __m512 even[NV], odd[NV];  // two sets of sums, for the latency of fused multiply-add
  for (int k = 0; k < NV; ++k) {
    even[k] = _mm512_loadu_ps(y + 16 * k);
    odd[k] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    uint64_t m = bits[w];
    const float* x = xt + w * 64 * width;
    for (int pairs = __builtin_popcountll(m) / 2; pairs; --pairs) {
      const float* first = x + __builtin_ctzll(m) * width;
      m &= m - 1;
      const float* second = x + __builtin_ctzll(m) * width;
      m &= m - 1;
      const __m512 a = _mm512_set1_ps(widen(values[0])), b = _mm512_set1_ps(widen(values[1]));
      values += 2;
      for (int k = 0; k < NV; ++k) {
        even[k] = _mm512_fmadd_ps(a, _mm512_loadu_ps(first + 16 * k), even[k]);
        odd[k] = _mm512_fmadd_ps(b, _mm512_loadu_ps(second + 16 * k), odd[k]);
      }
    }
    if (m) {
      const float* last = x + __builtin_ctzll(m) * width;
      const __m512 a = _mm512_set1_ps(widen(*values++));
      for (int k = 0; k < NV; ++k)
        even[k] = _mm512_fmadd_ps(a, _mm512_loadu_ps(last + 16 * k), even[k]);
    }
  }
  for (int k = 0; k < NV; ++k) _mm512_storeu_ps(y + 16 * k, _mm512_add_ps(even[k], odd[k]));
  return values;
}

}  // namespace
}  // namespace gossamer

#include "bitmap/picked.hpp"
