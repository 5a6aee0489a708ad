#include "limits/driver.hpp"

namespace gossamer {

template <>
const LimitsKernels Tables<LimitsKernels>::avx512 = {run_read, run_gather, run_multiply,
                                                     run_dense_matvec};

}  // namespace gossamer
