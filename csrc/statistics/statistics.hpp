// What pruning itself computes: the largest scores of every row, and sums of many products that
// keep what rounding would lose. Portable: both are bound by memory or by integer counting.
#pragma once
#include <cstdint>

namespace gossamer {

// mask (rows, n) = 1 for the k largest of each row of scores; ties keep the lower index, and zeros
// of either sign are equal. 0 < k < n; no NaN. O(rows * n). False, and nothing useful in the mask,
// where a score is NaN.
bool top_mask(const float* scores, int64_t rows, int64_t n, int64_t k, uint8_t* mask, int threads);

// total + rest += product, element by element for rows x cols of them, each matrix with its own
// distance between rows. rest holds what the float32 total cannot ("A Floating-Point Technique for
// Extending the Available Precision", 1971).
void compensated_add(float* total, float* rest, int64_t stride, const float* product,
                     int64_t product_stride, int64_t rows, int64_t cols, int threads);

}  // namespace gossamer
