// Loops over rows, words and threads, shared by the instruction sets. The including file defines
// the two primitives declared below.
#pragma once
#include <omp.h>

#include <cmath>
#include <cstring>

#include "quantized.hpp"

namespace gossamer {
namespace {

// How one row lies in the values: its first byte, and which bits of a byte are its own.
struct Row {
  const uint8_t* values;
  const uint64_t* bitmap;  // null: dense
  uint8_t mask;
  int lift;                // integers are read times 1 << lift

  Row(const Quantized& m, int64_t row)
      : values(m.values + m.offsets[m.bits == 4 ? row / 2 : row]),
        bitmap(m.bitmap ? m.bitmap + row * m.words : nullptr),
        mask(m.bits == 8 ? 0xff : row % 2 ? 0xf0 : 0x0f),
        lift(m.bits == 4 && row % 2 ? 4 : 0) {}
};

// Row `row` times B inputs.
template <bool DENSE, int B>
void row_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out);

// The 64 integers of a word at their columns, lifted, zeros where none is kept.
void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out);

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline int zero_of(const Quantized& m, int64_t row, int64_t w) {
  return m.zeros ? m.zeros[row * m.groups + (w >> m.group_shift)] : 1 << (m.bits - 1);
}

inline float outliers_dot(const Quantized& m, int64_t row, const float* x) {
  float sum = 0.0f;
  for (int64_t k = m.outlier_ptr[row]; k < m.outlier_ptr[row + 1]; ++k)
    sum += m.outlier_values[k] * x[m.outlier_cols[k]];
  return sum;
}

template <bool DENSE>
void some_rows(const Quantized& m, const QuantInput* x, int64_t batch, float* y, const float* bias,
               int64_t from, int64_t to) {
  for (int64_t r = from; r < to; ++r) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) {
      float sums[4];
      row_dot<DENSE, 4>(m, r, x + b, sums);
      for (int k = 0; k < 4; ++k) y[(b + k) * m.rows + r] = sums[k];
    }
    for (; b < batch; ++b) row_dot<DENSE, 1>(m, r, x + b, y + b * m.rows + r);
    for (b = 0; b < batch; ++b) {
      if (m.outlier_ptr) y[b * m.rows + r] += outliers_dot(m, r, x[b].exact);
      if (bias) y[b * m.rows + r] += bias[r];
    }
  }
}

inline void unpack_row(const Quantized& m, int64_t row, float* out) {
  const Row place(m, row);
  const uint8_t* from = place.values;
  for (int64_t w = 0; w < m.words; ++w) {
    const uint64_t kept = place.bitmap ? place.bitmap[w] : ~uint64_t{0};
    uint8_t integers[64];
    word_integers(place, from, kept, integers);
    from += __builtin_popcountll(kept);
    const float scale = from_bf16(m.scales[row * m.groups + (w >> m.group_shift)]);
    const int zero = zero_of(m, row, w);
    const int64_t left = m.cols - w * 64, count = left < 64 ? left : 64;
    for (int64_t j = 0; j < count; ++j) {
      const int q = (integers[j] >> place.lift) - zero;
      out[w * 64 + j] = kept >> j & 1 ? scale * static_cast<float>(q) : 0.0f;
    }
  }
  if (!m.outlier_ptr) return;
  for (int64_t k = m.outlier_ptr[row]; k < m.outlier_ptr[row + 1]; ++k)
    out[m.outlier_cols[k]] += m.outlier_values[k];
}

// First row of share i of n, by bytes; even, so that no two threads read the same ones.
inline int64_t share_of_rows(const Quantized& m, int i, int n) {
  if (i == n) return m.rows;
  const int64_t pairs = m.bits == 4 ? (m.rows + 1) / 2 : m.rows;
  const int64_t goal = (m.offsets[pairs] + 16 * pairs) * i / n;  // an empty row costs something too
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.offsets[middle] + 16 * middle < goal) low = middle + 1;
    else high = middle;
  }
  return m.bits == 4 ? 2 * low : low;
}

inline void run_quantized_rows(const Quantized& m, const QuantInput* x, int64_t batch, float* y,
                               const float* bias, int64_t from, int64_t to) {
  if (m.bitmap) some_rows<false>(m, x, batch, y, bias, from, to);
  else some_rows<true>(m, x, batch, y, bias, from, to);
}

inline void run_quantized_matvec(const Quantized& m, const QuantInput* x, int64_t batch, float* y,
                                 const float* bias, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    run_quantized_rows(m, x, batch, y, bias, share_of_rows(m, i, n), share_of_rows(m, i + 1, n));
  }
}

inline void run_quantized_unpack(const Quantized& m, int64_t from, int64_t to, float* out,
                                 int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = from; r < to; ++r) unpack_row(m, r, out + (r - from) * m.cols);
}

inline void run_quantize_input(const float* x, int64_t cols, int64_t from_pair, int64_t to_pair,
                               int8_t* values, float* scales, float* sums) {
  for (int64_t b = from_pair; b < to_pair; ++b) {
    float block[128] = {};
    const int64_t left = cols - b * 128, stored = (left + 63) / 64 * 64;
    std::memcpy(block, x + b * 128, (left < 128 ? left : 128) * sizeof(float));
    float top = 0.0f, poison = 0.0f;
    for (int j = 0; j < 128; ++j) {
      const float size = std::fabs(block[j]);
      top = size > top ? size : top;
      poison += block[j] * 0.0f;  // NaN where the block holds NaN or infinity
    }
    const bool finite = poison == poison;
    const float turn = top > 0.0f && finite ? 127.0f / top : 0.0f;
    scales[b] = finite ? top / 127.0f : NAN;
    for (int j = 0; j < (stored < 128 ? stored : 128); ++j) {
      float scaled = finite ? block[j] * turn : 0.0f;
      scaled = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled;
      values[b * 128 + j] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(scaled)));
    }
    for (int64_t w = 2 * b; w * 64 < cols && w < 2 * b + 2; ++w) {
      int32_t sum = 0;
      for (int j = 0; j < 64; ++j) sum += values[w * 64 + j];
      sums[w] = static_cast<float>(sum) * scales[b];
    }
  }
}

}  // namespace

#define GOSSAMER_QUANTIZED(isa)                                                                   \
  void quantize_input_##isa(const float* x, int64_t cols, int64_t from, int64_t to,               \
                            int8_t* values, float* scales, float* sums) {                         \
    run_quantize_input(x, cols, from, to, values, scales, sums);                                  \
  }                                                                                               \
  void quantized_matvec_##isa(const Quantized& m, const QuantInput* x, int64_t batch, float* y,   \
                              const float* bias, int threads) {                                   \
    run_quantized_matvec(m, x, batch, y, bias, threads);                                          \
  }                                                                                               \
  void quantized_rows_##isa(const Quantized& m, const QuantInput& x, int64_t from, int64_t to,    \
                            float* y) {                                                           \
    run_quantized_rows(m, &x, 1, y, nullptr, from, to);                                           \
  }                                                                                               \
  void quantized_unpack_##isa(const Quantized& m, int64_t from, int64_t to, float* out,           \
                              int threads) {                                                      \
    run_quantized_unpack(m, from, to, out, threads);                                              \
  }

}  // namespace gossamer
