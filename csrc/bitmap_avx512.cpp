// AVX-512 path (F, BW, DQ, VL): 16 bits of the bitmap are an expand mask for 16 packed values.
#include <immintrin.h>

#include <cstdint>

#include "bitmap.hpp"

namespace gossamer {
namespace {

inline float widen(float value);
inline float widen(uint16_t value);

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
// Faults on masked-off lanes are suppressed, so the end of the array is safe.
inline __m512 load16(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline __m512 load16(const uint16_t* p, int count) {
  const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

template <class T, int B>
void row_dot(const Word* bits, int64_t words, const T* values, const T* end, const float* x,
             int64_t x_stride, float* out) {
  constexpr int kChains = B == 1 ? 2 : B == 2 ? 4 : 1;  // independent sums hide the latency of fused multiply-add
  __m512 sums[B][kChains];
  for (int b = 0; b < B; ++b)
    for (int c = 0; c < kChains; ++c) sums[b][c] = _mm512_setzero_ps();
  int64_t w = 0;
  for (; w < words && end - values >= 80; ++w) {  // 64 values and one whole vector beyond
    const uint64_t word = bits[w];
    const auto* masks = reinterpret_cast<const uint16_t*>(bits + w);
    _mm_prefetch(reinterpret_cast<const char*>(values) + 4096, _MM_HINT_T0);
    for (int part = 0; part < 4; ++part) {
      __mmask16 mask;  // loaded, not shifted out of the word: one instruction less per part
      __builtin_memcpy(&mask, masks + part, sizeof mask);
      const T* from = values + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
      const __m512 value = _mm512_maskz_expand_ps(mask, load16(from));
      for (int b = 0; b < B; ++b) {
        const __m512 input = _mm512_load_ps(x + b * x_stride + w * 64 + part * 16);
        __m512& sum = sums[b][part % kChains];
        sum = _mm512_mask3_fmadd_ps(value, input, sum, mask);
      }
    }
    values += __builtin_popcountll(word);
  }
  for (; w < words; ++w) {
    for (int part = 0; part < 4; ++part) {
      const __mmask16 mask = static_cast<__mmask16>(bits[w] >> (16 * part));
      const int count = __builtin_popcount(mask);
      const __m512 value = _mm512_maskz_expand_ps(mask, load16(values, count));
      values += count;
      for (int b = 0; b < B; ++b) {
        const __m512 input = _mm512_load_ps(x + b * x_stride + w * 64 + part * 16);
        __m512& sum = sums[b][part % kChains];
        sum = _mm512_mask3_fmadd_ps(value, input, sum, mask);
      }
    }
  }
  for (int b = 0; b < B; ++b) {
    __m512 total = sums[b][0];
    for (int c = 1; c < kChains; ++c) total = _mm512_add_ps(total, sums[b][c]);
    out[b] = _mm512_reduce_add_ps(total);
  }
}

// Two rows at once, from two places of the matrix: twice as many streams from memory are in flight,
// and each vector of x is loaded once for both. Adds in the order of row_dot<T, 1>, bit for bit.
template <class T>
void pair_dot(const Word* bits_a, const Word* bits_b, int64_t words, const T* a, const T* b,
              const T* end_a, const T* end_b, const float* x, float* out) {
  __m512 sums_a[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 sums_b[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t w = 0;
  for (; w < words && end_a - a >= 80 && end_b - b >= 80; ++w) {
    const uint64_t word_a = bits_a[w], word_b = bits_b[w];
    _mm_prefetch(reinterpret_cast<const char*>(a) + 2048, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(b) + 2048, _MM_HINT_T0);
    for (int part = 0; part < 4; ++part) {
      __mmask16 mask_a, mask_b;
      __builtin_memcpy(&mask_a, reinterpret_cast<const uint16_t*>(bits_a + w) + part, 2);
      __builtin_memcpy(&mask_b, reinterpret_cast<const uint16_t*>(bits_b + w) + part, 2);
      const uint64_t before = (uint64_t{1} << (16 * part)) - 1;
      const __m512 input = _mm512_load_ps(x + w * 64 + part * 16);
      const __m512 kept_a =
          _mm512_maskz_expand_ps(mask_a, load16(a + __builtin_popcountll(word_a & before)));
      const __m512 kept_b =
          _mm512_maskz_expand_ps(mask_b, load16(b + __builtin_popcountll(word_b & before)));
      sums_a[part % 2] = _mm512_mask3_fmadd_ps(kept_a, input, sums_a[part % 2], mask_a);
      sums_b[part % 2] = _mm512_mask3_fmadd_ps(kept_b, input, sums_b[part % 2], mask_b);
    }
    a += __builtin_popcountll(word_a);
    b += __builtin_popcountll(word_b);
  }
  for (; w < words; ++w) {
    for (int part = 0; part < 4; ++part) {
      const __mmask16 mask_a = static_cast<__mmask16>(bits_a[w] >> (16 * part));
      const __mmask16 mask_b = static_cast<__mmask16>(bits_b[w] >> (16 * part));
      const int count_a = __builtin_popcount(mask_a), count_b = __builtin_popcount(mask_b);
      const __m512 input = _mm512_load_ps(x + w * 64 + part * 16);
      const __m512 kept_a = _mm512_maskz_expand_ps(mask_a, load16(a, count_a));
      const __m512 kept_b = _mm512_maskz_expand_ps(mask_b, load16(b, count_b));
      sums_a[part % 2] = _mm512_mask3_fmadd_ps(kept_a, input, sums_a[part % 2], mask_a);
      sums_b[part % 2] = _mm512_mask3_fmadd_ps(kept_b, input, sums_b[part % 2], mask_b);
      a += count_a;
      b += count_b;
    }
  }
  out[0] = _mm512_reduce_add_ps(_mm512_add_ps(sums_a[0], sums_a[1]));
  out[1] = _mm512_reduce_add_ps(_mm512_add_ps(sums_b[0], sums_b[1]));
}

// The 64 positions of a word, zeros where it keeps nothing.
template <class T>
void expand_word(uint64_t word, const T* values, float* out) {
  for (int part = 0; part < 4; ++part) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * part));
    const int count = __builtin_popcount(mask);
    _mm512_storeu_ps(out + 16 * part, _mm512_maskz_expand_ps(mask, load16(values, count)));
    values += count;
  }
}

template <class T, int NV>
const T* row_axpy(const Word* bits, int64_t words, const T* values, const float* xt,
                  float* y) {
  constexpr int64_t width = 16 * NV;
  __m512 even[NV], odd[NV];  // two sets of sums, for the latency of fused multiply-add
  for (int k = 0; k < NV; ++k) {
    even[k] = _mm512_loadu_ps(y + 16 * k);
    odd[k] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    uint64_t m = bits[w];
    const float* x = xt + w * 64 * width;
    for (int pairs = __builtin_popcountll(m) / 2; pairs; --pairs) {
      const float* first = x + __builtin_ctzll(m) * width;
      m &= m - 1;
      const float* second = x + __builtin_ctzll(m) * width;
      m &= m - 1;
      const __m512 a = _mm512_set1_ps(widen(values[0])), b = _mm512_set1_ps(widen(values[1]));
      values += 2;
      for (int k = 0; k < NV; ++k) {
        even[k] = _mm512_fmadd_ps(a, _mm512_loadu_ps(first + 16 * k), even[k]);
        odd[k] = _mm512_fmadd_ps(b, _mm512_loadu_ps(second + 16 * k), odd[k]);
      }
    }
    if (m) {
      const float* last = x + __builtin_ctzll(m) * width;
      const __m512 a = _mm512_set1_ps(widen(*values++));
      for (int k = 0; k < NV; ++k)
        even[k] = _mm512_fmadd_ps(a, _mm512_loadu_ps(last + 16 * k), even[k]);
    }
  }
  for (int k = 0; k < NV; ++k) _mm512_storeu_ps(y + 16 * k, _mm512_add_ps(even[k], odd[k]));
  return values;
}

}  // namespace
}  // namespace gossamer

#include "decoder_driver.hpp"

namespace gossamer {
namespace {
constexpr int kVectors = 4;  // of 16 floats, in a batch tile of the grouped product
}
}  // namespace gossamer

#include "grouped_driver.hpp"
#include "limits_driver.hpp"

namespace gossamer {
void matvec_avx512(const Bitmap& m, const float* x, int64_t batch, float* y, const float* bias,
                   int threads) {
  run_matvec(m, x, batch, y, bias, threads);
}
void spmm_avx512(const Bitmap& m, const float* xt, int64_t tiles, int64_t width, float* yt,
                 const float* bias, int64_t* cursor, int threads) {
  run_spmm(m, xt, tiles, width, yt, bias, cursor, threads);
}
void decode_avx512(const Llama& m, int64_t token, int64_t position, float* logits, int threads) {
  run_decode(m, token, position, logits, threads);
}
void grouped_avx512(const Grouped& m, const Dense& d, const float* bias, bool relu, float* xt,
                 float* yt, int threads) {
  run_grouped(m, d, bias, relu, xt, yt, threads);
}
void unpack_avx512(const Bitmap& m, int64_t cols, int64_t from, int64_t to, float* out, int threads) {
  run_unpack(m, cols, from, to, out, threads);
}
float read_avx512(const float* data, int64_t n, int threads) { return run_read(data, n, threads); }
float multiply_avx512(int64_t steps, int threads) { return run_multiply(steps, threads); }
}  // namespace gossamer
