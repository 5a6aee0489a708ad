// AVX-512 with dot products of bfloat16: a unit is a pair of numbers. The backward pass is that of
// float32, and decoding waits for memory in any case.
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

}  // namespace
}  // namespace gossamer

#include "attention/driver.hpp"

namespace gossamer {

void attention_bf16(const AttentionTask& t, void* output, float* lse, int threads) {
  run_forward(t, output, lse, threads);
}

}  // namespace gossamer
