namespace gossamer {
namespace {
constexpr int kLanes = 4;    // floats in a register
constexpr int kVectors = 1;  // of 16 floats, in the widest tile of the batch
constexpr int kSums = 8;     // registers that hold its sums
}  // namespace
}  // namespace gossamer

#include "sell/driver.hpp"

namespace gossamer {

template <>
const SellKernels Tables<SellKernels>::portable = {run_sell};

}  // namespace gossamer
