// N:M products, AVX2 path: sixteen lanes are two registers.
#include <immintrin.h>

#include <cstdint>

#include "nm/nm.hpp"

namespace gossamer {
namespace {

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
constexpr int kParts = 2, kReach = 8;

inline Ints load_codes(const uint8_t* from, int width) {
  const auto* wide = reinterpret_cast<const __m256i*>(from);
  const auto* half = reinterpret_cast<const __m128i*>(from);
  if (width == 4) return {_mm256_loadu_si256(wide), _mm256_loadu_si256(wide + 1)};
  if (width == 2)
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(half)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1))};
  const __m128i bytes = _mm_loadu_si128(half);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline Ints load_ints(const int32_t* from) {
  return load_codes(reinterpret_cast<const uint8_t*>(from), 4);
}

template <int BITS>
inline Ints next(Ints codes) {
  return {_mm256_srli_epi32(codes.low, BITS), _mm256_srli_epi32(codes.high, BITS)};
}

template <int BITS>
inline Ints columns(Ints codes, Ints base) {
  const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
  return {_mm256_or_si256(_mm256_and_si256(codes.low, mask), base.low),
          _mm256_or_si256(_mm256_and_si256(codes.high, mask), base.high)};
}

inline Floats load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen8(__m128i raw) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Floats load16(const uint16_t* p) {
  const auto* from = reinterpret_cast<const __m128i*>(p);
  return {widen8(_mm_loadu_si128(from)), widen8(_mm_loadu_si128(from + 1))};
}

// Eight lanes whose columns lie, in order of the lanes, in 2 * PARTS registers of eight.
template <int PARTS>
inline __m256 lookup8(const float* x, __m256i at) {
  const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), at);
  const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), at);
  if constexpr (PARTS == 1) return _mm256_blend_ps(first, second, 0xf0);
  const __m256 third = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 16), at);
  const __m256 fourth = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 24), at);
  return _mm256_blend_ps(_mm256_blend_ps(first, second, 0x0c), _mm256_blend_ps(third, fourth, 0xc0),
                         0xf0);
}

template <int PARTS>
inline Floats lookup(const float* x, Ints at) {
  if constexpr (PARTS == 0)
    return {_mm256_i32gather_ps(x, at.low, 4), _mm256_i32gather_ps(x, at.high, 4)};
  else return {lookup8<PARTS>(x, at.low), lookup8<PARTS>(x + 16 * PARTS, at.high)};
}

inline Floats fused(Floats a, Floats b, Floats sum) {
  return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}
inline Floats none() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline float total(Floats v) {
  const __m256 both = _mm256_add_ps(v.low, v.high);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void spill(Ints v, int32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, v.high);
}
inline void spill(Floats v, float* to) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + 8, v.high);
}

}  // namespace
}  // namespace gossamer

#include "nm/driver.hpp"

namespace gossamer {

template <>
const NmKernels Tables<NmKernels>::avx2 = {run_nm_matvec, run_nm_rows, run_nm_unpack};

}  // namespace gossamer
