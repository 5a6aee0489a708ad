// Active-line products, compiled for portable.
#include "active/driver.hpp"

namespace gossamer {
void active_sum_portable(const Lines& m, const float* x, const int32_t* index, int64_t active, float* y,
                     const float* bias, float* sums, float* coefficients, int threads) {
  run_active_sum(m, x, index, active, y, bias, sums, coefficients, threads);
}
int64_t active_mlp_portable(const GatedMlp& m, const float* x, float* y, float* hidden, int32_t* index,
                        float* x_scaled, float* sums, float* coefficients, int threads) {
  return run_gated(m, x, y, hidden, index, x_scaled, sums, coefficients, threads);
}
int64_t active_above_portable(const float* x, int64_t n, float threshold, int32_t* index) {
  return find_above(x, n, threshold, index);
}
}  // namespace gossamer
