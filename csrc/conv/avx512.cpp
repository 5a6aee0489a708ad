namespace gossamer {
namespace {
constexpr int kLanes = 16;        // floats in a register
constexpr int kTileVectors = 4;  // registers in a strip for tiles of 4 outputs
}  // namespace
}  // namespace gossamer

#include "conv/driver.hpp"

namespace gossamer {

template <>
const ConvKernels Tables<ConvKernels>::avx512 = {run_conv};

}  // namespace gossamer
