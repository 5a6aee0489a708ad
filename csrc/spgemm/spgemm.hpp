// Sparse times sparse, row by row, with a hash table per thread as accumulator.
//
// One translation unit for all processors: the loops follow indices and probe tables, and nothing
// in them maps to wider vectors.
#pragma once
#include <cstdint>

namespace gossamer {

struct Rows {
  const int64_t* row_ptr;  // (rows + 1)
  const int32_t* columns;
  const void* values;      // float32, or float64
  int64_t rows, cols;
  bool wide;               // float64
};

// counts[i] = how many columns row i of a * b has. O(multiplications).
void spgemm_count(const Rows& a, const Rows& b, int64_t* counts, int threads);

// Columns and values of a * b at row_ptr, which the counts add up to; each row's columns ascending
// if `sorted`, else in the order in which they turn up. O(multiplications), plus the sorting.
void spgemm_multiply(const Rows& a, const Rows& b, const int64_t* row_ptr, bool sorted,
                     int32_t* columns, void* values, int threads);

}  // namespace gossamer
