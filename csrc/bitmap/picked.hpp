// A row times inputs picked by their columns, for the x86 paths. The inputs are loaded one by one
// and put together: gather instructions take 2 cycles each on processors that guard them against
// leaks, this 1.4.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const uint16_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}

// x at four columns.
inline __m128 pick4(const uint16_t* columns, const float* x) {
  uint64_t at;
  __builtin_memcpy(&at, columns, sizeof at);
  __m128 found = _mm_load_ss(x + (at & 0xffff));
  found = _mm_insert_ps(found, _mm_load_ss(x + (at >> 16 & 0xffff)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + (at >> 32 & 0xffff)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + (at >> 48)), 0x30);
}

inline float sum4(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

template <class T, int B>
void picked_dot(const uint16_t* columns, const T* values, int64_t count, const float* x,
                int64_t x_stride, float* out) {
  constexpr int kChains = B == 1 ? 4 : 2;  // independent sums hide the latency of multiply-add
  __m128 sums[B][kChains];
  for (int b = 0; b < B; ++b)
    for (int c = 0; c < kChains; ++c) sums[b][c] = _mm_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(values + k) + 2048, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns + k) + 2048, _MM_HINT_T0);
    for (int part = 0; part < 4; ++part) {
      const __m128 value = load4(values + k + 4 * part);
      for (int b = 0; b < B; ++b) {
        __m128& sum = sums[b][part % kChains];
        sum = _mm_fmadd_ps(value, pick4(columns + k + 4 * part, x + b * x_stride), sum);
      }
    }
  }
  for (int b = 0; b < B; ++b) {
    __m128 total = sums[b][0];
    for (int c = 1; c < kChains; ++c) total = _mm_add_ps(total, sums[b][c]);
    out[b] = sum4(total);
    for (int64_t j = k; j < count; ++j) out[b] += widen(values[j]) * x[b * x_stride + columns[j]];
  }
}

}  // namespace
}  // namespace gossamer
