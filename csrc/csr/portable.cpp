namespace gossamer {
namespace {
constexpr int kLanes = 4;  // floats in a register
constexpr int kVectors = 2;  // of 16 floats, in a batch tile of compressed rows
}  // namespace
}  // namespace gossamer

#include "csr/driver.hpp"

namespace gossamer {

template <>
const CsrKernels Tables<CsrKernels>::portable = {run_csr_linear, run_csr_sampled};

}  // namespace gossamer
