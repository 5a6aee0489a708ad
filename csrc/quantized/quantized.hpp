// Matrices of 4- or 8-bit integers, sparse by a bitmap or dense.
//
// A weight is scale * (q - zero), with one scale and zero per row and group of columns. The kept
// weights' integers follow each other in row order, one byte each; with 4 bits two rows share their
// bytes, the even row in the low halves and the odd one in the high halves.
#pragma once
#include <cstdint>

#include "common/tables.hpp"
#include "common/word.hpp"

namespace gossamer {

constexpr int64_t kSlack = 16;  // bytes behind the last integer that kernels may read

struct Quantized {
  const uint8_t* values;
  const int64_t* offsets;  // of each row (8 bits) or pair of rows (4 bits) in values, and the end
  const Word* bitmap;  // (rows, words), or null: every column kept, rows padded to 64
  const uint16_t* scales;  // bfloat16 (rows, groups)
  const uint8_t* zeros;  // (rows, groups), or null: half the range
  const int64_t* outlier_ptr;  // rows + 1, or null: further weights, held exactly
  const int32_t* outlier_cols;
  const float* outlier_values;
  int64_t rows, cols, words;  // words: of 64 columns in a row
  int64_t groups;  // of a row
  int group_shift;  // a group is 64 << group_shift columns
  int bits;  // 4 or 8
  int balanced;  // 4 or 8: every so many columns keep exactly half; 0: not so
};

// Activations as 8-bit integers, scaled per 128: x[j] ~ scales[j / 128] * values[j].
struct QuantInput {
  const float* exact;  // (cols,)
  const int8_t* values;  // (words * 64,), on a 64-byte boundary
  const float* scales;  // (pairs of words,)
  const float* sums;  // (words,): of the inputs as scaled integers
};

inline int64_t pairs_of(int64_t words) { return (words + 1) / 2; }

struct QuantizedKernels {
  // Rounds to nearest even; a block with a NaN or infinity gets scale NaN.
  void (*quantize_input)(const float* x, int64_t cols, int64_t from_pair, int64_t to_pair,
                         int8_t* values, float* scales, float* sums);

  // y (batch, rows) = x W^T + bias; x as `batch` quantised inputs.
  void (*matvec)(const Quantized&, const QuantInput* x, int64_t batch, float* y, const float* bias,
                 int threads);

  // y[from..to] = rows from..to of W x, bias not added; one thread.
  void (*rows)(const Quantized&, const QuantInput& x, int64_t from, int64_t to, float* y);

  // Rows from..to as dense float32 rows of cols into out.
  void (*unpack)(const Quantized&, int64_t from, int64_t to, float* out, int threads);

  // The integers of a sparse matrix as a dense one holds them, the zero point where none is kept:
  // rows (8 bits) or pairs of rows (4 bits) of words * 64 bytes.
  void (*densify)(const Quantized&, uint8_t* out, int threads);

  // y (batch, rows) = x W^T + bias, x (batch, cols) rounded to integers on the way, for large
  // batches; or null.
  void (*matmul)(const Quantized&, const float* x, int64_t batch, float* y, const float* bias,
                 int threads);
};

// Of the table for AVX-512, which wants byte dot products too.
void quantized_matmul(const Quantized&, const float* x, int64_t batch, float* y, const float* bias,
                      int threads);

template <>
const QuantizedKernels Tables<QuantizedKernels>::portable;
template <>
const QuantizedKernels Tables<QuantizedKernels>::avx2;
template <>
const QuantizedKernels Tables<QuantizedKernels>::avx512;

}  // namespace gossamer
