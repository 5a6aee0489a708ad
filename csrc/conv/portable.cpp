namespace gossamer {
namespace {
constexpr int kLanes = 4;        // floats in a register
constexpr int kTileVectors = 2;  // registers in a strip for tiles of 4 outputs
}  // namespace
}  // namespace gossamer

#include "conv/driver.hpp"

namespace gossamer {

template <>
const ConvKernels Tables<ConvKernels>::portable = {run_conv};

}  // namespace gossamer
