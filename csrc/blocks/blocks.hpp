// Sparse times dense where weights are kept or dropped in blocks of R x C: block compressed rows.
//
// A block's weights lie column after column, R of them for each. The sums of a block row stay in
// registers, so each loaded vector of the batch serves R rows. Columns are walked in blocks of
// kCsrBlock: the weights of a block row then stay in the first-level cache, and the batch in the
// second, while all of its tiles pass.
#pragma once
#include <cstdint>

#include "csr/csr.hpp"

namespace gossamer {

struct Blocks {
  const void* values;      // (blocks, C, R): float32, or bfloat16 as uint16
  const int32_t* columns;  // the first column of each block, ascending within a block row
  const int64_t* splits;   // (cols / kCsrBlock rounded up + 1, rows / R), as in Csr
  int64_t rows, cols, height, width;  // height R: 1, 2, 4, 8 or 16, a divisor of rows; width C
  bool bf16;
  int64_t block_rows() const { return rows / height; }
  int64_t parts() const { return (cols + kCsrBlock - 1) / kCsrBlock; }
};

struct BlocksKernels {
  // y (batch, rows) = x (batch, cols) W^T + bias, all float32. xt: scratch of cols * kCsrWidth
  // floats, yt: of rows * kCsrWidth, both on 64-byte boundaries.
  void (*linear)(const Blocks&, const float* x, float* y, int64_t batch, const float* bias,
                 float* xt, float* yt, int threads);
};

template <>
const BlocksKernels Tables<BlocksKernels>::portable;
template <>
const BlocksKernels Tables<BlocksKernels>::avx2;
template <>
const BlocksKernels Tables<BlocksKernels>::avx512;

}  // namespace gossamer
