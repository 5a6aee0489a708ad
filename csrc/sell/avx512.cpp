namespace gossamer {
namespace {
constexpr int kLanes = 16;   // floats in a register
constexpr int kVectors = 4;  // of 16 floats, in the widest tile of the batch
constexpr int kSums = 16;    // registers that hold its sums
}  // namespace
}  // namespace gossamer

#include "sell/driver.hpp"

namespace gossamer {

template <>
const SellKernels Tables<SellKernels>::avx512 = {run_sell};

}  // namespace gossamer
