// Puts the kept integers of 64 columns at their columns, with AVX-512 F and BW alone: processors
// with VBMI2 have an instruction for it. Included by the sources compiled for AVX-512.
//
// Where a kept weight goes follows from counting the bits before it: one multiplication counts
// within 8 columns, one shuffle carries to the next 8, and a byte shuffle within 16 columns does
// the rest. Where every 4 (or 8) columns keep exactly 2 (or 4), nothing needs counting: a table
// says what each 4 bits of the bitmap mean.
#pragma once
#include <immintrin.h>

#include "quantized/quantized.hpp"

namespace gossamer {
namespace {

// `from` holds the kept integers; columns that are not kept get the bytes of `rest`.
inline __m512i expand_any(const uint8_t* from, uint64_t kept, __m512i rest) {
  const auto mask = static_cast<__mmask64>(kept);
  const __m512i ones = _mm512_maskz_mov_epi8(mask, _mm512_set1_epi8(1));
  const __m512i count = _mm512_mullo_epi64(ones, _mm512_set1_epi64(0x0101010101010101));
  const __m512i carry =
      _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 7, 7, 7, 7, 7, 7, 7, 7));
  const __m512i before = _mm512_add_epi8(
      count, _mm512_add_epi8(_mm512_shuffle_epi8(count, carry), _mm512_set1_epi8(-1)));
  const auto sixteen = [&](int64_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
  };
  __m512i found = _mm512_broadcast_i32x4(sixteen(0));
  found = _mm512_mask_broadcast_i32x4(found, 0x00f0, sixteen(__builtin_popcountll(kept & 0xffff)));
  found =
      _mm512_mask_broadcast_i32x4(found, 0x0f00, sixteen(__builtin_popcountll(kept & 0xffffffff)));
  found = _mm512_mask_broadcast_i32x4(found, 0xf000, sixteen(__builtin_popcountll(kept << 16)));
  return _mm512_mask_shuffle_epi8(rest, mask, found, before);
}

// What 4 bits of a bitmap mean, as 4 bytes: for a kept column how many of the 4 come before it, for
// another 8, which is where `rest` lies in a lane of 16 bytes.
constexpr uint32_t place_of(uint32_t bits) {
  uint32_t places = 0, before = 0;
  for (int k = 0; k < 4; ++k) {
    places |= (bits >> k & 1 ? before : 8u) << (8 * k);
    before += bits >> k & 1;
  }
  return places;
}

// How many they are, in each of 4 bytes; none where all 4 are kept, since then the other 4 columns
// of the 8 keep none, and 8 + 4 would leave the half of the lane that holds `rest`.
constexpr uint32_t count_of(uint32_t bits) {
  const uint32_t count = (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3 & 1);
  return (count == 4 ? 0 : count) * 0x01010101u;
}

#define GOSSAMER_OF_16(f)                                                                      \
  _mm512_setr_epi32(static_cast<int>(f(0)), static_cast<int>(f(1)), static_cast<int>(f(2)),    \
                    static_cast<int>(f(3)), static_cast<int>(f(4)), static_cast<int>(f(5)),    \
                    static_cast<int>(f(6)), static_cast<int>(f(7)), static_cast<int>(f(8)),    \
                    static_cast<int>(f(9)), static_cast<int>(f(10)), static_cast<int>(f(11)),  \
                    static_cast<int>(f(12)), static_cast<int>(f(13)), static_cast<int>(f(14)), \
                    static_cast<int>(f(15)))

// Where every BALANCED columns keep exactly BALANCED / 2: where in its lane of `spread` each
// column's integer lies.
template <int BALANCED>
inline __m512i even_places(const Word* kept) {
  static_assert(BALANCED == 4 || BALANCED == 8, "");
  const auto* halves = reinterpret_cast<const char*>(kept);
  int low, high;
  __builtin_memcpy(&low, halves, 4);
  __builtin_memcpy(&high, halves + 4, 4);
  const __m512i bits = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  const __m512i shifts =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i fours = _mm512_srlv_epi32(bits, shifts);  // only the low 4 bits count below
  const __m512i places = _mm512_permutexvar_epi32(fours, GOSSAMER_OF_16(place_of));
  if constexpr (BALANCED == 4) {
    return _mm512_add_epi8(
        places, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606)));
  } else {
    const __m512i counts = _mm512_permutexvar_epi32(fours, GOSSAMER_OF_16(count_of));
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0x04040404, 0x04040404));
    return _mm512_add_epi8(_mm512_add_epi8(places, first), _mm512_slli_epi64(counts, 32));
  }
}

// 8 of the 32 integers at `from` in the lower half of every lane, `rest` in the upper.
inline __m512i spread(const uint8_t* from, __m512i rest) {
  const __m256i integers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_mask_permutexvar_epi64(rest, 0x55, _mm512_setr_epi64(0, 0, 1, 0, 2, 0, 3, 0),
                                       _mm512_castsi256_si512(integers));
}

#undef GOSSAMER_OF_16

}  // namespace
}  // namespace gossamer
