namespace gossamer {
namespace {
constexpr int kLanes = 4;  // floats in a register
}  // namespace
}  // namespace gossamer

#include "attention/backward.hpp"
#include "attention/decode.hpp"

namespace gossamer {

template <>
const AttentionKernels Tables<AttentionKernels>::portable = {run_forward, run_backward, run_decode};

}  // namespace gossamer
