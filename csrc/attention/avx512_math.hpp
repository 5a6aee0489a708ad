// The vectors of AVX-512, for math.hpp.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#define GOSSAMER_ATTENTION_AVX512

namespace gossamer {
namespace {

constexpr int kLanes = 16;

inline __m512 filled(float value) { return _mm512_set1_ps(value); }
inline __m512 greater(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }

inline __m512 keep(__m512 x, uint32_t bits) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), static_cast<__mmask16>(bits), x);
}

inline __m512 only(__m512 x, uint32_t bits) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
}

inline bool any_above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

inline uint32_t up_to(const int32_t* positions, int32_t limit) {
  return _mm512_cmple_epi32_mask(_mm512_loadu_si512(positions), _mm512_set1_epi32(limit));
}

// See small_power and power in math.hpp.
inline __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, 8), f = x - whole;
  __m512 p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return _mm512_scalef_ps(p * f + 1.0f, whole);
}

}  // namespace
}  // namespace gossamer
