// AVX-512 with VBMI2, which spreads 32 bfloat16 at once. Places are in pairs of lanes: the even ones
// of 32 in one vector of sums, the odd ones in the next.
#include "attention/avx512_math.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kWides = 4;
constexpr int kBeyond = 32;

__attribute__((always_inline)) inline void expand(uint64_t word, int, const uint16_t* entries,
                                                  Wide (&x)[kWides]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint16_t* from = entries + (half ? __builtin_popcount(static_cast<uint32_t>(word)) : 0);
    const __m512i pairs = _mm512_maskz_expand_epi16(static_cast<__mmask32>(word >> (32 * half)),
                                                    _mm512_loadu_si512(from));
    x[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    x[2 * half + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
  }
}

template <class X>
void take_sums(const float* from, Wide (&sums)[kWides]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int c = 0; c < kWides; c += 2) {
    const __m512 first = load(from + 16 * c), second = load(from + 16 * (c + 1));
    sums[c] = _mm512_permutex2var_ps(first, even, second);
    sums[c + 1] = _mm512_permutex2var_ps(first, odd, second);
  }
}

template <class X>
void put_sums(const Wide (&sums)[kWides], float* to) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int c = 0; c < kWides; c += 2) {
    store(Wide(_mm512_permutex2var_ps(sums[c], low, sums[c + 1])), to + 16 * c);
    store(Wide(_mm512_permutex2var_ps(sums[c], high, sums[c + 1])), to + 16 * (c + 1));
  }
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/driver.hpp"

namespace gossamer {

void decode_tiles_bf16(const TiledTask& t, void* output, float* lse, int threads) {
  decode_tiles(t, static_cast<uint16_t*>(output), lse, threads);
}

}  // namespace gossamer
