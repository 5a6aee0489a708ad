// AVX-512 path (F, BW, DQ, VL, VNNI). Where a kept weight goes follows from counting the bits before
// it: one multiplication counts within 8 columns, one shuffle carries to the next 8, and a byte
// shuffle within 16 columns puts 64 weights at their columns. Processors with VBMI2 have an
// instruction for all that; this code does without.
#include <immintrin.h>

#include "quantized_driver.hpp"

namespace gossamer {
namespace {

// The 64 integers of a word at their columns, other bits of their bytes too; `rest` elsewhere.
inline __m512i expand(const uint8_t* from, uint64_t kept, __m512i rest) {
  const auto mask = static_cast<__mmask64>(kept);
  const __m512i ones = _mm512_maskz_mov_epi8(mask, _mm512_set1_epi8(1));
  const __m512i count = _mm512_mullo_epi64(ones, _mm512_set1_epi64(0x0101010101010101));
  const __m512i carry = _mm512_broadcast_i32x4(
      _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 7, 7, 7, 7, 7, 7, 7, 7));
  const __m512i before = _mm512_add_epi8(
      count, _mm512_add_epi8(_mm512_shuffle_epi8(count, carry), _mm512_set1_epi8(-1)));
  const auto sixteen = [&](int64_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
  };
  __m512i found = _mm512_broadcast_i32x4(sixteen(0));
  found = _mm512_mask_broadcast_i32x4(found, 0x00f0, sixteen(__builtin_popcountll(kept & 0xffff)));
  found = _mm512_mask_broadcast_i32x4(found, 0x0f00, sixteen(__builtin_popcountll(kept & 0xffffffff)));
  found = _mm512_mask_broadcast_i32x4(found, 0xf000, sixteen(__builtin_popcountll(kept << 16)));
  return _mm512_mask_shuffle_epi8(rest, mask, found, before);
}

inline void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out) {
  const __m512i own = _mm512_set1_epi8(static_cast<char>(row.mask));
  const __m512i found = expand(from, kept, _mm512_setzero_si512());
  _mm512_storeu_si512(out, _mm512_and_si512(found, own));
}

constexpr int64_t kChunk = 64;    // words whose scales are multiplied out at once
constexpr int64_t kAhead = 6144;  // bytes that integers are fetched ahead

// The products of both scales for up to kChunk words from `first` on: one per word, or per pair of
// words where a group is at least as long. Returns what the zeros add to the row, in 16 parts.
template <int PER>
inline __m512 both_scales(const Quantized& m, int64_t row, int64_t first, int64_t words,
                          const QuantInput& x, float lowered, float* out) {
  const uint16_t* own = m.scales + row * m.groups;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i even = _mm512_slli_epi32(lane, 1);
  const int shift = m.group_shift - (PER - 1);  // from a unit, a word or a pair, to its group
  __m512 excess = _mm512_setzero_ps();
  for (int64_t k = 0; k < words; k += 16 * PER) {
    const int64_t units = (words - k + PER - 1) / PER, count = units < 16 ? units : 16;
    const auto there = static_cast<__mmask16>((1u << count) - 1);
    const int64_t unit = (first + k) / PER;
    __m512i raw, zero = _mm512_set1_epi32(1 << (m.bits - 1));
    if (shift == 0) {
      raw = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, own + unit));
    } else {  // longer groups: several units share one
      alignas(64) uint32_t found[16] = {};
      for (int64_t j = 0; j < count; ++j) found[j] = own[(unit + j) >> shift];
      raw = _mm512_load_si512(found);
    }
    if (m.zeros) {
      alignas(64) int32_t found[16] = {};
      for (int64_t j = 0; j < count; ++j) found[j] = zero_of(m, row, (unit + j) * PER);
      zero = _mm512_load_si512(found);
    }
    const __m512 weights = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    const float* totals = x.sums + first + k;
    __m512 inputs, sums;
    if (PER == 2) {
      inputs = _mm512_maskz_loadu_ps(there, x.scales + unit);
      const auto part = [&](int64_t at) {
        const int64_t left = words - k - at, some = left < 0 ? 0 : left < 16 ? left : 16;
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << some) - 1), totals + at);
      };
      const __m512 low = part(0), high = part(16);
      sums = _mm512_add_ps(_mm512_permutex2var_ps(low, even, high),
                           _mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)),
                                                  high));
    } else {
      const auto pairs = static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1);
      inputs = _mm512_permutexvar_ps(_mm512_srli_epi32(lane, 1),
                                     _mm512_maskz_loadu_ps(pairs, x.scales + unit / 2));
      sums = _mm512_maskz_loadu_ps(there, totals);
    }
    excess = _mm512_fmadd_ps(_mm512_mul_ps(weights, _mm512_cvtepi32_ps(zero)), sums, excess);
    _mm512_store_ps(out + k / PER,
                    _mm512_mul_ps(_mm512_mul_ps(weights, _mm512_set1_ps(lowered)), inputs));
  }
  return excess;
}

// Adds to totals for up to kChunk words from `first` on, whose integers begin at `from`; returns
// where they end. A function of its own so that its loop keeps everything in registers.
//
// Columns that are not kept are given the zero point as their integer, so that every column is off
// by the same amount, zero times the sum of the inputs, which is taken from the whole row at once.
template <bool DENSE, bool ZEROS, int B, int PER>
__attribute__((noinline)) const uint8_t* some_words(const Quantized& m, int64_t row, int64_t first,
                                                    int64_t words, const uint8_t* from,
                                                    const QuantInput* x, __m512* totals) {
  const Row place(m, row);
  const uint64_t* bitmap = DENSE ? nullptr : place.bitmap + first;
  const uint8_t* zeros = ZEROS ? m.zeros + row * m.groups : nullptr;
  const int group_shift = m.group_shift, lift = place.lift;
  const __m512i own = _mm512_set1_epi8(static_cast<char>(place.mask));
  __m512i rest = _mm512_set1_epi8(static_cast<char>(1 << (m.bits - 1) << lift));
  alignas(64) float scales[B][kChunk];
  const int8_t* inputs[B];
  __m512 sums[B];
  for (int b = 0; b < B; ++b) {
    const __m512 excess =
        both_scales<PER>(m, row, first, words, x[b], lift ? 1.0f / 16 : 1.0f, scales[b]);
    inputs[b] = x[b].values + first * 64;
    sums[b] = _mm512_sub_ps(totals[b], excess);
  }
  const auto word = [&](int64_t k, __m512i* dots) {
    __m512i integers;
    _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
    if constexpr (DENSE) {
      integers = _mm512_and_si512(_mm512_loadu_si512(from), own);
      from += 64;
    } else {
      const uint64_t kept = bitmap[k];
      integers = _mm512_and_si512(expand(from, kept, rest), own);
      from += __builtin_popcountll(kept);
    }
    for (int b = 0; b < B; ++b)
      dots[b] = _mm512_dpbusd_epi32(dots[b], integers, _mm512_load_si512(inputs[b] + k * 64));
  };
  const auto unit_of = [&](int64_t unit, int count) {
    if constexpr (ZEROS)
      rest = _mm512_set1_epi8(
          static_cast<char>(zeros[(first + unit * PER) >> group_shift] << lift));
    __m512i dots[B];
    for (int b = 0; b < B; ++b) dots[b] = _mm512_setzero_si512();
    for (int k = 0; k < count; ++k) word(unit * PER + k, dots);
    for (int b = 0; b < B; ++b)
      sums[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[b]), _mm512_set1_ps(scales[b][unit]), sums[b]);
  };
  int64_t unit = 0;
  for (; (unit + 1) * PER <= words; ++unit) unit_of(unit, PER);
  if (unit * PER < words) unit_of(unit, 1);
  for (int b = 0; b < B; ++b) totals[b] = sums[b];
  return from;
}

template <bool DENSE, bool ZEROS, int B, int PER>
void whole_row(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  __m512 sums[B];
  for (int b = 0; b < B; ++b) sums[b] = _mm512_setzero_ps();
  const uint8_t* from = Row(m, row).values;
  for (int64_t first = 0; first < m.words; first += kChunk) {
    const int64_t words = m.words - first < kChunk ? m.words - first : kChunk;
    from = some_words<DENSE, ZEROS, B, PER>(m, row, first, words, from, x, sums);
  }
  for (int b = 0; b < B; ++b) out[b] = _mm512_reduce_add_ps(sums[b]);
}

template <bool DENSE, int B>
void row_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  if (m.zeros) return whole_row<DENSE, true, B, 1>(m, row, x, out);
  if (m.group_shift > 0) return whole_row<DENSE, false, B, 2>(m, row, x, out);
  return whole_row<DENSE, false, B, 1>(m, row, x, out);
}

}  // namespace
GOSSAMER_QUANTIZED(avx512)
}  // namespace gossamer
