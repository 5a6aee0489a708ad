// Sparse matrices whose values change at every step: compressed rows, with float32 values.
//
// A batch is transposed into tiles (column, batch), so each kept weight multiplies contiguous
// vectors. Columns are walked in blocks of kCsrBlock, which keeps the tile's part that a block
// reads in the second-level cache while all rows pass over it. The transposed matrix has an index
// of its own over the same values.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int64_t kCsrBlock = 1024, kCsrWidth = 128;

struct Csr {
  const float* values;
  const int32_t* columns;  // ascending within a row
  const int64_t* splits;   // (blocks + 1, rows): the first entry at or past column b * kCsrBlock
  int64_t rows, cols;
  int64_t blocks() const { return (cols + kCsrBlock - 1) / kCsrBlock; }
};

// The transposed matrix's values: those of the matrix in another order, put in order for the call
// (looked up one by one inside the product they cost it half its speed). Null where in order.
struct Reordered {
  const int32_t* places;  // entry e is values[places[e]]
  float* values;          // scratch of as many floats
};

struct CsrKernels {
  // y (batch, rows) = x (batch, cols) W^T + bias. xt: scratch of cols * kCsrWidth floats, yt: of
  // rows * kCsrWidth, both on 64-byte boundaries.
  void (*linear)(Csr, Reordered, const float* x, float* y, int64_t batch, const float* bias,
                 float* xt, float* yt, int threads);

  // grad[e] = sum over the batch of dy[., row of e] * x[., column of e], for the entries of the
  // matrix in order. xt and yt as above.
  void (*sampled)(const Csr&, const float* x, const float* dy, float* grad, int64_t batch,
                  float* xt, float* yt, int threads);
};

template <>
const CsrKernels Tables<CsrKernels>::portable;
template <>
const CsrKernels Tables<CsrKernels>::avx2;
template <>
const CsrKernels Tables<CsrKernels>::avx512;

}  // namespace gossamer
