namespace gossamer {
namespace {
constexpr int kLanes = 8;  // floats in a register
}  // namespace
}  // namespace gossamer

#include "attention/backward.hpp"
#include "attention/decode.hpp"

namespace gossamer {

template <>
const AttentionKernels Tables<AttentionKernels>::avx2 = {run_forward, run_backward, run_decode};

}  // namespace gossamer
