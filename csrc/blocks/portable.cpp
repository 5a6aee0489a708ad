namespace gossamer {
namespace {
constexpr int kLanes = 4;  // floats in a register
constexpr int kSums = 2;  // of 16 floats, in registers for the product with blocks
constexpr int kHeight = 2;  // of rows that have such sums
}  // namespace
}  // namespace gossamer

#include "blocks/driver.hpp"

namespace gossamer {

template <>
const BlocksKernels Tables<BlocksKernels>::portable = {run_blocks};

}  // namespace gossamer
