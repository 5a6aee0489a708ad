// Loops over rows, tiles and threads, shared by the instruction sets. The including file defines,
// in an anonymous namespace:
//   template <class T, int B> void row_dot(const Word* bits, int64_t words, const T* values,
//       const T* end, const float* x, int64_t x_stride, float* out);
//   template <class T, int B> void picked_dot(const uint16_t* columns, const T* values,
//       int64_t count, const float* x, int64_t x_stride, float* out): the same by columns
//   template <class T> void pair_dot(...): two rows, of one matrix or of two, at once
//   template <class T> void expand_word(uint64_t word, const T* values, float* out);
//   template <class T, int NV> const T* row_axpy(const Word* bits, int64_t words,
//       const T* values, const float* xt, float* y);
// where `end` is the end of the whole value array: nothing at or past it may be read.
#pragma once
#include <omp.h>

#include "bitmap/bitmap.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

// First row whose values start at or after share i of n: threads get equal numbers of weights.
inline int64_t split_rows(const Bitmap& m, int i, int n) {
  const int64_t goal = (m.nnz + m.rows) * i / n;  // a row costs something even when empty
  int64_t low = 0, high = m.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.row_ptr[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return i == n ? m.rows : low;
}

// Row r times B inputs.
template <class T, int B>
void one_row(const Bitmap& m, int64_t r, const float* x, int64_t x_stride, float* out) {
  const T *all = static_cast<const T*>(m.values), *values = all + m.row_ptr[r];
  if (m.columns)
    return picked_dot<T, B>(m.columns + m.row_ptr[r], values, m.row_ptr[r + 1] - m.row_ptr[r], x,
                            x_stride, out);
  const Word* bits = reinterpret_cast<const Word*>(m.bits + r * m.stride);
  row_dot<T, B>(bits, m.stride / 8, values, all + m.nnz, x, x_stride, out);
}

template <class T, int B>
void matvec_rows(const Bitmap& m, const float* x, float* y, const float* bias, int64_t from,
                 int64_t to) {
  for (int64_t r = from; r < to; ++r) {
    float sums[B];
    one_row<T, B>(m, r, x, m.stride * 8, sums);
    for (int b = 0; b < B; ++b) y[b * m.rows + r] = sums[b] + (bias ? bias[r] : 0.0f);
  }
}

// Row a of matrix m and row b of matrix n (as many columns) times x, into out[0] and out[1].
template <class T>
void two_rows(const Bitmap& m, int64_t a, const Bitmap& n, int64_t b, const float* x, float* out) {
  if (m.columns || n.columns) {
    one_row<T, 1>(m, a, x, 0, out);
    return one_row<T, 1>(n, b, x, 0, out + 1);
  }
  const T *first = static_cast<const T*>(m.values), *second = static_cast<const T*>(n.values);
  pair_dot<T>(reinterpret_cast<const Word*>(m.bits + a * m.stride),
              reinterpret_cast<const Word*>(n.bits + b * n.stride), m.stride / 8,
              first + m.row_ptr[a], second + n.row_ptr[b], first + m.nnz, second + n.nnz, x, out);
}

// Batch 1: each row goes with the one half a share further on.
template <class T>
void matvec_pairs(const Bitmap& m, const float* x, float* y, const float* bias, int64_t from,
                  int64_t to) {
  const int64_t half = (to - from) / 2;
  for (int64_t r = from; r < from + half; ++r) {
    float sums[2];
    two_rows<T>(m, r, m, r + half, x, sums);
    y[r] = sums[0] + (bias ? bias[r] : 0.0f);
    y[r + half] = sums[1] + (bias ? bias[r + half] : 0.0f);
  }
  matvec_rows<T, 1>(m, x, y, bias, from + 2 * half, to);
}

template <class T>
void matvec_dispatch(const Bitmap& m, const float* x, int64_t batch, float* y, const float* bias,
                     int64_t from, int64_t to) {
  const int64_t x_stride = m.stride * 8;
  for (; batch >= 4; batch -= 4, x += 4 * x_stride, y += 4 * m.rows)
    matvec_rows<T, 4>(m, x, y, bias, from, to);
  if (batch == 3) matvec_rows<T, 3>(m, x, y, bias, from, to);
  if (batch == 2) matvec_rows<T, 2>(m, x, y, bias, from, to);
  if (batch == 1) matvec_pairs<T>(m, x, y, bias, from, to);
}

inline void run_matvec(const Bitmap& m, const float* x, int64_t batch, float* y, const float* bias,
                       int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t from = split_rows(m, i, n), to = split_rows(m, i + 1, n);
    if (m.bf16) matvec_dispatch<uint16_t>(m, x, batch, y, bias, from, to);
    else matvec_dispatch<float>(m, x, batch, y, bias, from, to);
  }
}

// Columns are taken 256 at a time: a tile of x is then 64 KiB, reused by every row from cache.
constexpr int64_t kColumnWords = 4;

template <class T, int NV>
void spmm_rows(const Bitmap& m, const float* xt, int64_t tiles, float* yt, const float* bias,
               int64_t* cursor, int64_t from, int64_t to) {
  constexpr int64_t width = 16 * NV;
  const T* values = static_cast<const T*>(m.values);
  const int64_t words = m.stride / 8;
  for (int64_t t = 0; t < tiles; ++t) {
    const float* x = xt + t * words * 64 * width;
    float* y = yt + t * m.rows * width;
    for (int64_t r = from; r < to; ++r) {
      cursor[r] = m.row_ptr[r];
      for (int64_t k = 0; k < width; ++k) y[r * width + k] = bias ? bias[r] : 0.0f;
    }
    for (int64_t w = 0; w < words; w += kColumnWords) {
      const int64_t count = words - w < kColumnWords ? words - w : kColumnWords;
      for (int64_t r = from; r < to; ++r) {
        const Word* bits = reinterpret_cast<const Word*>(m.bits + r * m.stride) + w;
        const T* stop =
            row_axpy<T, NV>(bits, count, values + cursor[r], x + w * 64 * width, y + r * width);
        cursor[r] = stop - values;
      }
    }
  }
}

template <class T>
void spmm_dispatch(const Bitmap& m, const float* xt, int64_t tiles, int64_t width, float* yt,
                   const float* bias, int64_t* cursor, int64_t from, int64_t to) {
  switch (width) {
    case 16: return spmm_rows<T, 1>(m, xt, tiles, yt, bias, cursor, from, to);
    case 32: return spmm_rows<T, 2>(m, xt, tiles, yt, bias, cursor, from, to);
    case 48: return spmm_rows<T, 3>(m, xt, tiles, yt, bias, cursor, from, to);
    default: return spmm_rows<T, 4>(m, xt, tiles, yt, bias, cursor, from, to);
  }
}

inline void run_spmm(const Bitmap& m, const float* xt, int64_t tiles, int64_t width, float* yt,
                     const float* bias, int64_t* cursor, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t from = split_rows(m, i, n), to = split_rows(m, i + 1, n);
    if (m.bf16) spmm_dispatch<uint16_t>(m, xt, tiles, width, yt, bias, cursor, from, to);
    else spmm_dispatch<float>(m, xt, tiles, width, yt, bias, cursor, from, to);
  }
}

template <class T>
void unpack_row(const Bitmap& m, int64_t cols, int64_t row, float* out) {
  const T* values = static_cast<const T*>(m.values) + m.row_ptr[row];
  const Word* bits = reinterpret_cast<const Word*>(m.bits + row * m.stride);
  int64_t j = 0;
  for (; j + 64 <= cols; j += 64) {
    expand_word<T>(bits[j / 64], values, out + j);
    values += __builtin_popcountll(bits[j / 64]);
  }
  if (j == cols) return;
  float last[64];
  expand_word<T>(bits[j / 64], values, last);
  __builtin_memcpy(out + j, last, (cols - j) * sizeof(float));
}

inline void run_unpack(const Bitmap& m, int64_t cols, int64_t from, int64_t to, float* out,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = from; r < to; ++r) {
    if (m.bf16) unpack_row<uint16_t>(m, cols, r, out + (r - from) * cols);
    else unpack_row<float>(m, cols, r, out + (r - from) * cols);
  }
}

}  // namespace
}  // namespace gossamer
