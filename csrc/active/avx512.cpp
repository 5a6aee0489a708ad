#include "active/driver.hpp"

namespace gossamer {

template <>
const ActiveKernels Tables<ActiveKernels>::avx512 = {run_active_sum, run_gated, find_above};

}  // namespace gossamer
