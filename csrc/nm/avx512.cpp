// N:M products, AVX-512 path: a code vector is shifted once per block, and the inputs of a span are
// looked up by permutations of whole registers.
#include <immintrin.h>

#include <cstdint>

#include "nm/nm.hpp"

namespace gossamer {
namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int kParts = 8, kReach = 32;

inline Ints load_codes(const uint8_t* from, int width) {
  if (width == 4) return _mm512_loadu_si512(from);
  if (width == 2)
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }

template <int BITS>
inline Ints next(Ints codes) {
  return _mm512_srli_epi32(codes, BITS);
}

template <int BITS>
inline Ints columns(Ints codes, Ints base) {  // (codes & mask) | base in one instruction
  return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32((1 << BITS) - 1), base, 0xea);
}

inline Floats load16(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Lanes outside a part's mask keep what they hold: the result of a part before, or their index.
template <int PARTS>
inline Floats lookup(const float* x, Ints at) {
  if constexpr (PARTS == 0) {
    return _mm512_i32gather_ps(at, x, 4);
  } else if constexpr (PARTS == 1) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(x), at, _mm512_loadu_ps(x + 16));
  } else {
    constexpr int lanes = 16 / PARTS;
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; ++part) {
      const auto mask = static_cast<__mmask16>(((1 << lanes) - 1) << (part * lanes));
      at = _mm512_castps_si512(_mm512_mask2_permutex2var_ps(
          _mm512_loadu_ps(x + 32 * part), at, mask, _mm512_loadu_ps(x + 32 * part + 16)));
    }
    return _mm512_castsi512_ps(at);
  }
}

inline Floats fused(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats none() { return _mm512_setzero_ps(); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }
inline void spill(Ints v, int32_t* to) { _mm512_storeu_si512(to, v); }
inline void spill(Floats v, float* to) { _mm512_storeu_ps(to, v); }

}  // namespace
}  // namespace gossamer

#include "nm/driver.hpp"

namespace gossamer {

template <>
const NmKernels Tables<NmKernels>::avx512 = {run_nm_matvec, run_nm_rows, run_nm_unpack};

}  // namespace gossamer
