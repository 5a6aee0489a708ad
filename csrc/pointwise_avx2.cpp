// Convolutions on channels-first images, compiled for avx2.
#include "depthwise_driver.hpp"
#include "pointwise_driver.hpp"

namespace gossamer {
void pointwise_avx2(const Pointwise& m, const float* x, float* y, int64_t images, int64_t pixels,
                    const float* bias, float low, float high, float* scratch, int threads) {
  run_pointwise(m, x, y, images, pixels, bias, low, high, scratch, threads);
}
void depthwise_avx2(const Planes& p, const float* x, const float* weight, const float* bias,
                    float* y, float* scratch, int threads) {
  run_depthwise(p, x, weight, bias, y, scratch, threads);
}
}  // namespace gossamer
