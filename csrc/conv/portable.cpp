// Convolutions on channels-first images, compiled for portable.
namespace gossamer {
namespace {
constexpr int kLanes = 4;        // floats in a register
constexpr int kTileVectors = 2;  // registers in a strip for tiles of 4 outputs
}  // namespace
}  // namespace gossamer

#include "conv/driver.hpp"

namespace gossamer {
void conv_portable(const Conv& c, const float* x, float* y, float* scratch, int threads) {
  run_conv(c, x, y, scratch, threads);
}
}  // namespace gossamer
