// Sparse times dense in the pattern-grouped form, for batches.
//
// Rows are cut into tiles of 4, columns into blocks of kBlock. Inside a tile and block the columns
// are sorted by which of the 4 rows keep them: 15 patterns, one count each. The loop for a pattern
// has no branches, and every loaded vector of the batch serves all rows of the pattern while the
// sums stay in registers. kBlock columns of one batch tile (64 floats each) fill a quarter of a
// megabyte, which stays in the second-level cache while all row tiles pass over it.
#pragma once
#include <cstdint>

namespace gossamer {

constexpr int64_t kTile = 4, kBlock = 1024, kPatterns = 16;

struct Grouped {
  const uint16_t* counts;    // (blocks, tiles, 16): columns per pattern, bit r is row r of the tile
  const uint16_t* columns;   // within the block, pattern after pattern
  const void* values;        // row 0..3 of each column; float32, or bfloat16 as uint16
  const int64_t* column_ptr; // (blocks * tiles + 1)
  const int64_t* value_ptr;  // (blocks * tiles + 1)
  int64_t rows, cols;
  bool bf16;
  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  int64_t blocks() const { return (cols + kBlock - 1) / kBlock; }
};

// x (batch, cols) and y (batch, rows): float32, or both bfloat16.
struct Dense {
  const void* x;
  void* y;
  int64_t batch;
  bool bf16;
};

// y = x W^T + bias, then max(0, .) if relu. xt: scratch of cols * 64 floats; yt: of tiles * 4 * 64
// floats; both on 64-byte boundaries. `values` has two readable bytes before its beginning.
using GroupedLinear = void (*)(const Grouped&, const Dense&, const float* bias, bool relu, float* xt,
                               float* yt, int threads);

void grouped_portable(const Grouped&, const Dense&, const float*, bool, float*, float*, int);
void grouped_avx2(const Grouped&, const Dense&, const float*, bool, float*, float*, int);
void grouped_avx512(const Grouped&, const Dense&, const float*, bool, float*, float*, int);

}  // namespace gossamer
