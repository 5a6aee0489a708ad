// Sparse 1x1 convolution, compiled for avx2.
#include "pointwise_driver.hpp"

namespace gossamer {
void pointwise_avx2(const Pointwise& m, const float* x, float* y, int64_t images, int64_t pixels,
                    const float* bias, float low, float high, float* scratch, int threads) {
  run_pointwise(m, x, y, images, pixels, bias, low, high, scratch, threads);
}
}  // namespace gossamer
