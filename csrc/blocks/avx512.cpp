namespace gossamer {
namespace {
constexpr int kLanes = 16;  // floats in a register
constexpr int kSums = 24;  // of 16 floats, in registers for the product with blocks
constexpr int kHeight = 8;  // of rows that have such sums
}  // namespace
}  // namespace gossamer

#include "blocks/driver.hpp"

namespace gossamer {

template <>
const BlocksKernels Tables<BlocksKernels>::avx512 = {run_blocks};

}  // namespace gossamer
