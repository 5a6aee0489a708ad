// Loops over rows, words and threads, shared by the instruction sets. The including file defines
// the two primitives declared below.
#pragma once
#include <omp.h>

#include "quantized/parts.hpp"

namespace gossamer {
namespace {

// ROWS rows from `row` on times B inputs into out (ROWS, B).
template <bool DENSE, int ROWS, int B>
void rows_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out);

// The 64 integers of a word at their columns, lifted, zeros where none is kept.
void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out);

inline float outliers_dot(const Quantized& m, int64_t row, const float* x) {
  float sum = 0.0f;
  for (int64_t k = m.outlier_ptr[row]; k < m.outlier_ptr[row + 1]; ++k)
    sum += m.outlier_values[k] * x[m.outlier_cols[k]];
  return sum;
}

// y's ROWS columns from `row` on.
template <bool DENSE, int ROWS>
void rows_of_all(const Quantized& m, const QuantInput* x, int64_t batch, float* y,
                 const float* bias, int64_t row) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) {
    float sums[ROWS * 4];
    rows_dot<DENSE, ROWS, 4>(m, row, x + b, sums);
    for (int i = 0; i < ROWS * 4; ++i) y[(b + i % 4) * m.rows + row + i / 4] = sums[i];
  }
  for (; b < batch; ++b) rows_dot<DENSE, ROWS, 1>(m, row, x + b, y + b * m.rows + row);
  for (b = 0; b < batch; ++b) {
    for (int64_t r = row; r < row + ROWS; ++r) {
      if (m.outlier_ptr) y[b * m.rows + r] += outliers_dot(m, r, x[b].exact);
      if (bias) y[b * m.rows + r] += bias[r];
    }
  }
}

template <bool DENSE>
void some_rows(const Quantized& m, const QuantInput* x, int64_t batch, float* y, const float* bias,
               int64_t from, int64_t to) {
  int64_t r = from;
  // Two rows at once: they share their bytes, or the loads of inputs where these are what is left.
  if (m.bits == 4 || (!DENSE && !m.balanced && !m.zeros))
    for (; r + 2 <= to; r += 2) rows_of_all<DENSE, 2>(m, x, batch, y, bias, r);
  for (; r < to; ++r) rows_of_all<DENSE, 1>(m, x, batch, y, bias, r);
}

inline void unpack_row(const Quantized& m, int64_t row, float* out) {
  const Row place(m, row);
  const uint8_t* from = place.values;
  for (int64_t w = 0; w < m.words; ++w) {
    const uint64_t kept = place.bitmap ? place.bitmap[w] : ~uint64_t{0};
    uint8_t integers[64];
    word_integers(place, from, kept, integers);
    from += __builtin_popcountll(kept);
    const float scale = widen(m.scales[row * m.groups + (w >> m.group_shift)]);
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

// A row's integers over the bytes that it shares, which are 0 where they are its own.
inline void densify_row(const Quantized& m, int64_t row, uint8_t* out) {
  const Row place(m, row);
  const uint8_t* from = place.values;
  for (int64_t w = 0; w < m.words; ++w) {
    const uint64_t kept = place.bitmap ? place.bitmap[w] : ~uint64_t{0};
    const uint8_t zero = static_cast<uint8_t>(zero_of(m, row, w) << place.lift);
    uint8_t integers[64];
    word_integers(place, from, kept, integers);
    from += __builtin_popcountll(kept);
    for (int j = 0; j < 64; ++j) out[w * 64 + j] |= kept >> j & 1 ? integers[j] : zero;
  }
}

inline void run_quantized_densify(const Quantized& m, uint8_t* out, int threads) {
  const int64_t sharing = m.bits == 4 ? 2 : 1, width = m.words * 64;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t first = 0; first < m.rows; first += sharing) {
    uint8_t* bytes = out + first / sharing * width;
    std::memset(bytes, 0, width);
    for (int64_t r = first; r < first + sharing && r < m.rows; ++r) densify_row(m, r, bytes);
  }
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

inline void quantized_share(const Quantized& m, const QuantInput* x, int64_t batch, float* y,
                            const float* bias, int64_t from, int64_t to) {
  if (m.bitmap) some_rows<false>(m, x, batch, y, bias, from, to);
  else some_rows<true>(m, x, batch, y, bias, from, to);
}

inline void run_quantized_rows(const Quantized& m, const QuantInput& x, int64_t from, int64_t to,
                               float* y) {
  quantized_share(m, &x, 1, y, nullptr, from, to);
}

inline void run_quantized_matvec(const Quantized& m, const QuantInput* x, int64_t batch, float* y,
                                 const float* bias, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    quantized_share(m, x, batch, y, bias, share_of_rows(m, i, n), share_of_rows(m, i + 1, n));
  }
}

inline void run_quantized_unpack(const Quantized& m, int64_t from, int64_t to, float* out,
                                 int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = from; r < to; ++r) unpack_row(m, r, out + (r - from) * m.cols);
}

}  // namespace
}  // namespace gossamer
