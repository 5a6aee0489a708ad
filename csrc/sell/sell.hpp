// Sparse times dense for batches, in SELL-C-sigma form (Kreutzer et al. 2014) cut into blocks of
// columns.
//
// Columns come in blocks of kColumns, so that a block of the transposed batch (of 64) fills
// 28 KB and stays in the first-level cache; its stream into the registers is what bounds the
// product. Rows come in chunks of at most `chunk`. Within a chunk and block, rows are sorted by how
// many columns they keep and taken four at a time, as quads, padded to the longest, so that no loop
// ends where the processor does not expect it: a mispredicted branch costs as much as 30 products.
// In dense matrices two neighbours of four share many columns: those come first and are loaded
// once for both rows.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int64_t kColumns = 112, kQuad = 4, kShared = 4, kBatch = 64;

// Of a chunk and block `at`, at = chunk index * blocks + block: offsets[4 * at ..] are the first
// of its groups, rows, columns and values; those of the next end it.
struct Sell {
  const uint16_t* groups;  // (groups, 3): shared columns, single columns, quads of rows
  const uint16_t* places;  // within the chunk; `chunk` stands for no row
  const uint8_t* columns;  // within the block; kColumns stands for no column
  const void* values;  // float32, or bfloat16 as uint16
  const int64_t* offsets;  // (chunks * blocks + 1, 4)
  int64_t rows, cols, chunk;
  bool bf16;
  int64_t chunks() const { return (rows + chunk - 1) / chunk; }
  int64_t blocks() const { return (cols + kColumns - 1) / kColumns; }
};

// x (batch, cols) and y (batch, rows): float32, or both bfloat16.
struct Dense {
  const void* x;
  void* y;
  int64_t batch;
  bool bf16;
};

struct SellKernels {
  // y = x W^T + bias, then max(0, .) if relu. xt: scratch of blocks * (kColumns + 1) * kBatch
  // floats; yt: of threads * (chunk + 1) * kBatch floats; both on 64-byte boundaries. `values` has
  // two readable bytes before its beginning.
  void (*linear)(const Sell&, const Dense&, const float* bias, bool relu, float* xt, float* yt,
                 int threads);
};

template <>
const SellKernels Tables<SellKernels>::portable;
template <>
const SellKernels Tables<SellKernels>::avx2;
template <>
const SellKernels Tables<SellKernels>::avx512;

}  // namespace gossamer
