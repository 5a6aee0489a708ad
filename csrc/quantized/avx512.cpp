// AVX-512 path (F, BW, DQ, VL, VNNI) of the product with a few inputs.
#include "quantized/driver.hpp"
#include "quantized/expand_avx512.hpp"

namespace gossamer {
namespace {

inline void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out) {
  const __m512i own = _mm512_set1_epi8(static_cast<char>(row.mask));
  const __m512i found = expand_any(from, kept, _mm512_setzero_si512());
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
      sums = _mm512_add_ps(
          _mm512_permutex2var_ps(low, even, high),
          _mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high));
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

// ROWS rows, which share their bytes if they are two, at some word.
template <int ROWS>
struct Walk {
  const Word* bitmap[ROWS];
  const uint8_t* from[ROWS];
  __m512i own[ROWS];  // which bits of a byte are a row's own
  __m512i rest;       // the zero points, of both rows
};

template <int ROWS>
inline __m512i rest_of(const Quantized& m, int64_t row, int64_t w) {
  int both = 0;
  for (int r = 0; r < ROWS; ++r) both |= zero_of(m, row + r, w) << Row(m, row + r).lift;
  return _mm512_set1_epi8(static_cast<char>(both));
}

// The integers of word k at their columns; columns that keep none get the zero point.
template <bool DENSE, int BALANCED, int ROWS>
inline void next_word(Walk<ROWS>& walk, int64_t k, __m512i* integers) {
  _mm_prefetch(reinterpret_cast<const char*>(walk.from[0]) + kAhead, _MM_HINT_T0);
  if constexpr (DENSE) {
    const __m512i both = _mm512_loadu_si512(walk.from[0]);
    for (int r = 0; r < ROWS; ++r) integers[r] = _mm512_and_si512(both, walk.own[r]);
    walk.from[0] += 64;
  } else if constexpr (BALANCED > 0) {
    const __m512i both = spread(walk.from[0], walk.rest);
    for (int r = 0; r < ROWS; ++r)
      integers[r] = _mm512_and_si512(
          _mm512_shuffle_epi8(both, even_places<BALANCED>(walk.bitmap[r] + k)), walk.own[r]);
    walk.from[0] += 32;
  } else {
    for (int r = 0; r < ROWS; ++r) {
      const uint64_t kept = walk.bitmap[r][k];
      if (r) _mm_prefetch(reinterpret_cast<const char*>(walk.from[r]) + kAhead, _MM_HINT_T0);
      integers[r] = _mm512_and_si512(expand_any(walk.from[r], kept, walk.rest), walk.own[r]);
      walk.from[r] += __builtin_popcountll(kept);
    }
  }
}

// Adds to totals (ROWS, B) for up to kChunk words from `first` on, and moves the walk there. A
// function of its own so that its loop keeps everything in registers.
//
// Columns that are not kept are given the zero point as their integer, so that every column is off
// by the same amount, zero times the sum of the inputs, which is taken from the whole row at once.
template <bool DENSE, int BALANCED, bool ZEROS, int ROWS, int B, int PER>
__attribute__((noinline)) void some_words(const Quantized& m, int64_t row, int64_t first,
                                          int64_t words, const QuantInput* x, Walk<ROWS>& from,
                                          __m512* totals) {
  Walk<ROWS> walk = from;
  alignas(64) float scales[ROWS * B][kChunk];
  const int8_t* inputs[B];
  __m512 sums[ROWS * B];
  for (int b = 0; b < B; ++b) inputs[b] = x[b].values + first * 64;
  for (int i = 0; i < ROWS * B; ++i) {
    const float lowered = Row(m, row + i / B).lift ? 1.0f / 16 : 1.0f;
    sums[i] = _mm512_sub_ps(
        totals[i], both_scales<PER>(m, row + i / B, first, words, x[i % B], lowered, scales[i]));
  }
  const auto unit_of = [&](int64_t unit, int count) {
    if constexpr (ZEROS) walk.rest = rest_of<ROWS>(m, row, first + unit * PER);
    __m512i dots[ROWS * B];
    for (int i = 0; i < ROWS * B; ++i) dots[i] = _mm512_setzero_si512();
    if constexpr (!DENSE)  // the bits of the rows after these
      for (int r = 0; r < ROWS; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(walk.bitmap[r] + ROWS * m.words + unit * PER),
                     _MM_HINT_T0);
    for (int k = 0; k < count; ++k) {
      __m512i integers[ROWS];
      next_word<DENSE, BALANCED>(walk, unit * PER + k, integers);
      for (int i = 0; i < ROWS * B; ++i)
        dots[i] = _mm512_dpbusd_epi32(dots[i], integers[i / B],
                                      _mm512_load_si512(inputs[i % B] + (unit * PER + k) * 64));
    }
    for (int i = 0; i < ROWS * B; ++i)
      sums[i] =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), _mm512_set1_ps(scales[i][unit]), sums[i]);
  };
  int64_t unit = 0;
  for (; (unit + 1) * PER <= words; ++unit) unit_of(unit, PER);
  if (unit * PER < words) unit_of(unit, 1);
  for (int i = 0; i < ROWS * B; ++i) totals[i] = sums[i];
  for (int r = 0; r < ROWS; ++r) walk.bitmap[r] += DENSE ? 0 : words;
  from = walk;
}

template <bool DENSE, int BALANCED, bool ZEROS, int ROWS, int B, int PER>
void whole_rows(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  __m512 sums[ROWS * B];
  for (int i = 0; i < ROWS * B; ++i) sums[i] = _mm512_setzero_ps();
  Walk<ROWS> walk;
  walk.rest = rest_of<ROWS>(m, row, 0);
  for (int r = 0; r < ROWS; ++r) {
    const Row place(m, row + r);
    walk.bitmap[r] = place.bitmap, walk.from[r] = place.values;
    walk.own[r] = _mm512_set1_epi8(static_cast<char>(place.mask));
  }
  for (int64_t first = 0; first < m.words; first += kChunk) {
    const int64_t words = m.words - first < kChunk ? m.words - first : kChunk;
    some_words<DENSE, BALANCED, ZEROS, ROWS, B, PER>(m, row, first, words, x, walk, sums);
  }
  for (int i = 0; i < ROWS * B; ++i) out[i] = _mm512_reduce_add_ps(sums[i]);
}

template <bool DENSE, int BALANCED, int ROWS, int B>
void formed_rows(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  if (m.zeros) return whole_rows<DENSE, BALANCED, true, ROWS, B, 1>(m, row, x, out);
  if (m.group_shift > 0) return whole_rows<DENSE, BALANCED, false, ROWS, B, 2>(m, row, x, out);
  return whole_rows<DENSE, BALANCED, false, ROWS, B, 1>(m, row, x, out);
}

template <bool DENSE, int ROWS, int B>
void rows_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  if (!DENSE && m.balanced == 4) return formed_rows<false, 4, ROWS, B>(m, row, x, out);
  if (!DENSE && m.balanced == 8) return formed_rows<false, 8, ROWS, B>(m, row, x, out);
  return formed_rows<DENSE, 0, ROWS, B>(m, row, x, out);
}

}  // namespace

template <>
const QuantizedKernels Tables<QuantizedKernels>::avx512 = {
    run_quantize_input,   run_quantized_matvec,  run_quantized_rows,
    run_quantized_unpack, run_quantized_densify, quantized_matmul};

}  // namespace gossamer
