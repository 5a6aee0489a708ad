// Sparse 1x1 convolution, compiled for portable.
#include "pointwise_driver.hpp"

namespace gossamer {
void pointwise_portable(const Pointwise& m, const float* x, float* y, int64_t images, int64_t pixels,
                    const float* bias, float low, float high, float* scratch, int threads) {
  run_pointwise(m, x, y, images, pixels, bias, low, high, scratch, threads);
}
}  // namespace gossamer
