// AVX-512 with dot products of bfloat16: a unit is a pair of numbers.
#include "attention/avx512_math.hpp"

#define GOSSAMER_ATTENTION_BF16

namespace gossamer {
namespace {

constexpr int kPer = 2;

inline __m512 multiply_add(__m512 a, __m512 b, __m512 sums) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

inline void store_weights(const __m512* x, int count, float* to) {
  for (int v = 0; v < count; ++v) {
    const auto pairs = (__m256i)_mm512_cvtneps_pbh(x[v]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + v * 8), pairs);
  }
}

inline float half(const float* unit, int k) {
  uint32_t bits;
  __builtin_memcpy(&bits, unit, 4);
  bits = k % 2 ? bits & 0xffff0000u : bits << 16;
  float found;
  __builtin_memcpy(&found, &bits, 4);
  return found;
}
inline float weight_at(const float* weights, int k) { return half(weights + k / 2, k); }
inline float number_at(const float* unit, int k) { return half(unit, k); }

// Units of two rows: a number of the first in the lower half, one of the second in the upper.
inline __m512 paired(__m512 first, __m512 second) {
  const auto low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const auto high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// A row of units; `from` is padded with zeros to 16 numbers.
inline void pack_rounded(const float* from, int64_t width, float* to) {
  for (int64_t j = 0; j < width; j += 16) {
    const auto pairs = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j / 2), pairs);
  }
}

}  // namespace
}  // namespace gossamer

#include "attention/backward.hpp"

namespace gossamer {

void attention_bf16(const AttentionTask& t, void* output, float* lse, int threads) {
  run_forward(t, output, lse, threads);
}

void attention_bf16_backward(const AttentionTask& t, const AttentionGradients& g, int threads) {
  run_backward(t, g, threads);
}

}  // namespace gossamer
