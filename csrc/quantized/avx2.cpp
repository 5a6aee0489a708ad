// AVX2 path: where a kept weight goes follows from counting the bits before it, 16 columns at a
// time; one byte shuffle then puts 16 weights at their columns.
#include <immintrin.h>

#include "quantized/driver.hpp"

namespace gossamer {
namespace {

// 1 in every byte whose bit is set.
inline __m256i ones_of(uint32_t bits) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                          2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), spread);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, select), select);
  return _mm256_and_si256(set, _mm256_set1_epi8(1));
}

// 32 integers at their columns; `from` holds those of `bits` in order, the upper 16 from `upper`.
inline __m256i expand(const uint8_t* from, const uint8_t* upper, __m256i ones) {
  __m256i count = ones;  // of bits up to and with a byte's own, within 8
  count = _mm256_add_epi8(count, _mm256_slli_epi64(count, 8));
  count = _mm256_add_epi8(count, _mm256_slli_epi64(count, 16));
  count = _mm256_add_epi8(count, _mm256_slli_epi64(count, 32));
  const __m256i carry = _mm256_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 7, 7, 7, 7, 7, 7, 7, 7, -1,
                                         -1, -1, -1, -1, -1, -1, -1, 7, 7, 7, 7, 7, 7, 7, 7);
  count = _mm256_add_epi8(count, _mm256_shuffle_epi8(count, carry));
  const __m256i at = _mm256_sub_epi8(count, _mm256_set1_epi8(1));
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper));
  const __m256i found = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), at);
  return _mm256_and_si256(found, _mm256_sub_epi8(_mm256_setzero_si256(), ones));
}

inline __m256i half_of(const Row& row, const uint8_t* from, uint64_t kept, int h, __m256i ones) {
  const uint32_t bits = static_cast<uint32_t>(kept >> (32 * h));
  from += h ? __builtin_popcount(static_cast<uint32_t>(kept)) : 0;
  const uint8_t* upper = from + __builtin_popcount(bits & 0xffff);
  return _mm256_and_si256(expand(from, upper, ones), _mm256_set1_epi8(static_cast<char>(row.mask)));
}

inline void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out) {
  for (int h = 0; h < 2; ++h) {
    const __m256i ones = ones_of(static_cast<uint32_t>(kept >> (32 * h)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * h),
                        half_of(row, from, kept, h, ones));
  }
}

// 16 unsigned bytes times 16 signed ones; neighbours added up in 32 bits.
inline __m256i dot(__m128i weights, __m128i inputs) {
  return _mm256_madd_epi16(_mm256_cvtepu8_epi16(weights), _mm256_cvtepi8_epi16(inputs));
}

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <bool DENSE, int B>
void row_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  const Row place(m, row);
  const uint8_t* from = place.values;
  __m256 sums[B];
  for (int b = 0; b < B; ++b) sums[b] = _mm256_setzero_ps();
  for (int64_t w = 0; w < m.words; ++w) {
    const uint64_t kept = DENSE ? ~uint64_t{0} : place.bitmap[w];
    __m256i weighted[B], plain[B];
    for (int b = 0; b < B; ++b) weighted[b] = plain[b] = _mm256_setzero_si256();
    for (int h = 0; h < 2; ++h) {
      const __m256i ones = ones_of(static_cast<uint32_t>(kept >> (32 * h)));
      const __m256i integers = half_of(place, from, kept, h, ones);
      for (int b = 0; b < B; ++b) {
        const auto* input = reinterpret_cast<const __m128i*>(x[b].values + w * 64 + h * 32);
        const __m128i first = _mm_loadu_si128(input), second = _mm_loadu_si128(input + 1);
        weighted[b] = _mm256_add_epi32(
            weighted[b], _mm256_add_epi32(dot(_mm256_castsi256_si128(integers), first),
                                          dot(_mm256_extracti128_si256(integers, 1), second)));
        plain[b] = _mm256_add_epi32(
            plain[b], _mm256_add_epi32(dot(_mm256_castsi256_si128(ones), first),
                                       dot(_mm256_extracti128_si256(ones, 1), second)));
      }
    }
    from += __builtin_popcountll(kept);
    const __m256i zero = _mm256_set1_epi32(zero_of(m, row, w) << place.lift);
    const float scale = widen(m.scales[row * m.groups + (w >> m.group_shift)]) /
                        static_cast<float>(1 << place.lift);
    for (int b = 0; b < B; ++b) {
      const __m256i total = _mm256_sub_epi32(weighted[b], _mm256_mullo_epi32(plain[b], zero));
      sums[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total),
                                _mm256_set1_ps(scale * x[b].scales[w / 2]), sums[b]);
    }
  }
  for (int b = 0; b < B; ++b) out[b] = sum8(sums[b]);
}

template <bool DENSE, int ROWS, int B>
void rows_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  for (int r = 0; r < ROWS; ++r) row_dot<DENSE, B>(m, row + r, x, out + r * B);
}

}  // namespace

template <>
const QuantizedKernels Tables<QuantizedKernels>::avx2 = {
    run_quantize_input,   run_quantized_matvec,  run_quantized_rows,
    run_quantized_unpack, run_quantized_densify, nullptr};

}  // namespace gossamer
