// Bitmap-packed sparse matrices: one bit per position, kept values in row order.
//
// Kernels are plain functions over raw pointers; shapes and sizes are checked by the bindings.
// The primitives of an instruction set lie in <set>.hpp, the loops over them in driver.hpp.
#pragma once
#include <cstdint>

#include "common/tables.hpp"
#include "common/word.hpp"

namespace gossamer {

struct Bitmap {
  const uint8_t* bits;      // rows x stride bytes, bit j of a row is byte j/8, bit j%8
  const void* values;       // nnz float32, or bfloat16 as uint16
  const int64_t* row_ptr;   // rows + 1 offsets into values
  int64_t rows, stride;     // stride: bytes per row, a multiple of 8
  int64_t nnz;
  bool bf16;
  const uint16_t* columns = nullptr;  // of every value, or null; matvec reads them in place of bits
};

struct BitmapKernels {
  // y (batch, rows) = x (batch, stride * 8) W^T + bias, batch 1 to 8, float32, x on a 64-byte
  // boundary. Columns that a row does not keep never touch its result, even where x is NaN or
  // infinite. With `columns` inputs are picked, which costs by the weights that are kept, not by
  // all positions.
  void (*matvec)(const Bitmap&, const float* x, int64_t batch, float* y, const float* bias,
                 int threads);

  // yt (tiles, rows, width) = W xt (tiles, stride * 8, width) + bias, width 16, 32, 48 or 64.
  // cursor: scratch of `rows` offsets.
  void (*spmm)(const Bitmap&, const float* xt, int64_t tiles, int64_t width, float* yt,
               const float* bias, int64_t* cursor, int threads);

  // Rows from..to as dense float32 rows of `cols` into out.
  void (*unpack)(const Bitmap&, int64_t cols, int64_t from, int64_t to, float* out, int threads);
};

template <>
const BitmapKernels Tables<BitmapKernels>::portable;
template <>
const BitmapKernels Tables<BitmapKernels>::avx2;
template <>
const BitmapKernels Tables<BitmapKernels>::avx512;

}  // namespace gossamer
