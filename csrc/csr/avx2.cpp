namespace gossamer {
namespace {
constexpr int kLanes = 8;  // floats in a register
constexpr int kVectors = 4;  // of 16 floats, in a batch tile of compressed rows
}  // namespace
}  // namespace gossamer

#include "csr/driver.hpp"

namespace gossamer {

template <>
const CsrKernels Tables<CsrKernels>::avx2 = {run_csr_linear, run_csr_sampled};

}  // namespace gossamer
