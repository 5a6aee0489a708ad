// AVX-512 path (F, BW, DQ, VL, VNNI) of the product with many inputs: 32 rows of weights at a time
// are unpacked to bytes and transposed so that a vector holds 4 columns of 16 rows; then every 4
// inputs, spread over a vector, meet them in one byte dot product, and the sums stay in registers.
#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "quantized/expand_avx512.hpp"
#include "quantized/parts.hpp"

namespace gossamer {
namespace {

constexpr int kRows = 32;  // in two vectors
constexpr int kTile = 12;  // inputs at a time: 24 sums, 2 weights and 1 input fill the registers

// Inputs as integers, tile by tile: the same 4 columns of all inputs of a tile together. Lanes of
// the last tile that no input fills are computed and thrown away.
struct PackedInputs {
  std::vector<int32_t> four;   // (tiles, padded / 4, kTile): 4 integers each
  std::vector<float> scales;   // (tiles, pairs, kTile)
  std::vector<float> sums;     // (tiles, words, kTile)
};

void pack_inputs(const float* x, int64_t batch, int64_t cols, int threads, PackedInputs& out) {
  const int64_t words = (cols + 63) / 64, pairs = pairs_of(words);
  const int64_t tiles = (batch + kTile - 1) / kTile;
  const auto grow = [](auto& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  };
  grow(out.four, tiles * words * 16 * kTile);
  grow(out.scales, tiles * pairs * kTile);
  grow(out.sums, tiles * words * kTile);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tile = b / kTile, lane = b % kTile;
    for (int64_t p = 0; p < pairs; ++p) {
      alignas(64) int8_t values[128] = {};
      float sums[2] = {};
      const int64_t left = cols - p * 128;
      run_quantize_input(x + b * cols + p * 128, left < 128 ? left : 128, 0, 1, values,
                         &out.scales[(tile * pairs + p) * kTile + lane], sums);
      const int64_t some = words - 2 * p < 2 ? 1 : 2;
      for (int64_t k = 0; k < some * 16; ++k)
        std::memcpy(&out.four[((tile * words * 16) + p * 32 + k) * kTile + lane], values + 4 * k,
                    4);
      for (int64_t w = 0; w < some; ++w)
        out.sums[(tile * words + 2 * p + w) * kTile + lane] = sums[w];
    }
  }
}

// 16 vectors of 16 numbers, transposed.
inline void transpose(__m512i* v) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {  // b[i + j] now holds columns j, 4 + j, 8 + j, 12 + j of 4 rows
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(low2, high2, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    v[12 + j] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
  }
}

// 32 rows of weights, unpacked: integers (words, 16, 2, 16 rows of 4 columns), columns that are not
// kept with the zero point; scales and zeros (groups, 32), zeros as scale times zero.
struct Panel {
  struct alignas(64) Vector {
    __m512i v;
  };
  std::vector<Vector> integers;
  std::vector<float> scales, zeros;

  void resize(const Quantized& m) {
    integers.resize(m.words * 32);
    scales.resize(m.groups * kRows);
    zeros.resize(m.groups * kRows);
  }
};

template <bool DENSE, int BALANCED>
void unpack_panel(const Quantized& m, int64_t row, Panel& out) {
  const int64_t count = std::min<int64_t>(kRows, m.rows - row);
  const uint8_t* from[kRows];
  for (int64_t r = 0; r < count; ++r) from[r] = Row(m, row + r).values;
  for (int64_t w = 0; w < m.words; ++w)
    for (int half = 0; half < 2; ++half) {
      __m512i v[16];
      for (int k = 0; k < 16; ++k) {
        const int64_t r = 16 * half + k;
        v[k] = _mm512_setzero_si512();
        if (r >= count) continue;
        const Row place(m, row + r);
        const __m512i rest =
            _mm512_set1_epi8(static_cast<char>(zero_of(m, row + r, w) << place.lift));
        if constexpr (DENSE) {
          v[k] = _mm512_loadu_si512(from[r]);
          from[r] += 64;
        } else if constexpr (BALANCED > 0) {
          v[k] =
              _mm512_shuffle_epi8(spread(from[r], rest), even_places<BALANCED>(place.bitmap + w));
          from[r] += 32;
        } else {
          v[k] = expand_any(from[r], place.bitmap[w], rest);
          from[r] += __builtin_popcountll(place.bitmap[w]);
        }
        if (place.lift) v[k] = _mm512_srli_epi16(v[k], 4);
        if (m.bits == 4) v[k] = _mm512_and_si512(v[k], _mm512_set1_epi8(15));
      }
      transpose(v);
      for (int k = 0; k < 16; ++k) out.integers[(w * 16 + k) * 2 + half].v = v[k];
    }
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t r = 0; r < kRows; ++r) {
      const bool there = r < count;
      const float scale = there ? widen(m.scales[(row + r) * m.groups + g]) : 0.0f;
      out.scales[g * kRows + r] = scale;
      out.zeros[g * kRows + r] =
          there ? scale * static_cast<float>(zero_of(m, row + r, g << m.group_shift)) : 0.0f;
    }
}

// One half of a panel's scales and zeros, and what they make of one input's sums.
struct Scales {
  __m512 scale, zero;
};

inline __m512 scaled(__m512i dots, const Scales& own, float input_scale, float input_sum,
                     __m512 sum) {
  const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), own.scale);
  sum = _mm512_fmadd_ps(product, _mm512_set1_ps(input_scale), sum);
  return _mm512_fnmadd_ps(own.zero, _mm512_set1_ps(input_sum), sum);
}

// _mm512_dpbusd_epi32, written out: with 24 sums GCC 12 copies them about and spills.
inline void add_products(__m512i& sum, __m512i weights, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
}

// Adds the products of `steps` times 4 columns and as many inputs as there are I to out (N, 32).
// Written over a list of numbers and not as a loop, so that the sums become registers.
template <int... I>
inline void tile_part(std::integer_sequence<int, I...>, const Panel::Vector* weights,
                      const int32_t* four, int64_t steps, const float* scales, const float* zeros,
                      const float* input_scales, const float* input_sums, __m512* out) {
  __m512i low[] = {(static_cast<void>(I), _mm512_setzero_si512())...};
  __m512i high[] = {(static_cast<void>(I), _mm512_setzero_si512())...};
  for (int64_t k = 0; k < steps; ++k) {
    const __m512i first = weights[2 * k].v, second = weights[2 * k + 1].v;
    const int32_t* inputs = four + k * kTile;
    const auto add = [&](__m512i& one, __m512i& other, int32_t number) {
      const __m512i input = _mm512_set1_epi32(number);
      add_products(one, first, input);
      add_products(other, second, input);
    };
    (add(low[I], high[I], inputs[I]), ...);
  }
  const Scales one{_mm512_loadu_ps(scales), _mm512_loadu_ps(zeros)};
  const Scales other{_mm512_loadu_ps(scales + 16), _mm512_loadu_ps(zeros + 16)};
  ((out[2 * I] = scaled(low[I], one, input_scales[I], input_sums[I], out[2 * I]),
    out[2 * I + 1] = scaled(high[I], other, input_scales[I], input_sums[I], out[2 * I + 1])),
   ...);
}

// One tile of N inputs times a panel; out (N, 32).
template <int N>
void tile_of(const Quantized& m, const Panel& panel, const PackedInputs& x, int64_t tile,
             __m512* out) {
  const int64_t pairs = pairs_of(m.words), per = m.group_shift > 0 ? 2 : 1;
  for (int i = 0; i < 2 * N; ++i) out[i] = _mm512_setzero_ps();
  for (int64_t w = 0; w < m.words; w += per) {
    const int64_t words = std::min(per, m.words - w), g = w >> m.group_shift;
    alignas(64) float sums[kTile];
    const float* first = &x.sums[(tile * m.words + w) * kTile];
    for (int n = 0; n < kTile; ++n) sums[n] = first[n] + (words > 1 ? first[kTile + n] : 0.0f);
    tile_part(std::make_integer_sequence<int, N>{}, &panel.integers[w * 32],
              &x.four[(tile * m.words + w) * 16 * kTile], words * 16, &panel.scales[g * kRows],
              &panel.zeros[g * kRows], &x.scales[(tile * pairs + w / 2) * kTile], sums, out);
  }
}

void write_tile(const __m512* sums, int64_t count, int64_t rows, const float* bias, float* y,
                int64_t stride) {
  for (int h = 0; h < 2; ++h) {
    const int64_t left = rows - 16 * h;
    if (left <= 0) return;
    const auto there = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffff);
    const __m512 add = bias ? _mm512_maskz_loadu_ps(there, bias + 16 * h) : _mm512_setzero_ps();
    for (int64_t n = 0; n < count; ++n)
      _mm512_mask_storeu_ps(y + n * stride + 16 * h, there, _mm512_add_ps(sums[2 * n + h], add));
  }
}

// Adds what the outliers of 32 rows give; columns: x (cols, batch).
void add_outliers(const Quantized& m, int64_t row, int64_t batch, const float* columns, float* y) {
  std::vector<float> sums(batch);
  for (int64_t r = row; r < std::min(row + kRows, m.rows); ++r) {
    if (m.outlier_ptr[r] == m.outlier_ptr[r + 1]) continue;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = m.outlier_ptr[r]; k < m.outlier_ptr[r + 1]; ++k) {
      const float* column = columns + m.outlier_cols[k] * batch;
      for (int64_t b = 0; b < batch; ++b) sums[b] += m.outlier_values[k] * column[b];
    }
    for (int64_t b = 0; b < batch; ++b) y[b * m.rows + r] += sums[b];
  }
}

void panel_times_all(const Quantized& m, int64_t row, const Panel& panel, const PackedInputs& x,
                     int64_t batch, float* y, const float* bias) {
  for (int64_t first = 0; first < batch; first += kTile) {
    __m512 sums[2 * kTile];
    const int64_t count = std::min<int64_t>(kTile, batch - first), tile = first / kTile;
    if (count > 8) tile_of<12>(m, panel, x, tile, sums);
    else if (count > 4) tile_of<8>(m, panel, x, tile, sums);
    else tile_of<4>(m, panel, x, tile, sums);
    write_tile(sums, count, m.rows - row, bias ? bias + row : nullptr, y + first * m.rows + row,
               m.rows);
  }
}

}  // namespace

void quantized_matmul(const Quantized& m, const float* x, int64_t batch, float* y,
                      const float* bias, int threads) {
  thread_local PackedInputs packed;
  const PackedInputs& input = packed;
  pack_inputs(x, batch, m.cols, threads, packed);
  std::vector<float> columns;
  if (m.outlier_ptr) {
    columns.resize(m.cols * batch);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < m.cols; ++c) columns[c * batch + b] = x[b * m.cols + c];
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    thread_local Panel panel;
    panel.resize(m);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < m.rows; row += kRows) {
      if (!m.bitmap) unpack_panel<true, 0>(m, row, panel);
      else if (m.balanced == 4) unpack_panel<false, 4>(m, row, panel);
      else if (m.balanced == 8) unpack_panel<false, 8>(m, row, panel);
      else unpack_panel<false, 0>(m, row, panel);
      panel_times_all(m, row, panel, input, batch, y, bias);
      if (m.outlier_ptr) add_outliers(m, row, batch, columns.data(), y);
    }
  }
}

}  // namespace gossamer
