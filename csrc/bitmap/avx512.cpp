#include "bitmap/avx512.hpp"

#include "bitmap/driver.hpp"

namespace gossamer {

template <>
const BitmapKernels Tables<BitmapKernels>::avx512 = {run_matvec, run_spmm, run_unpack};

}  // namespace gossamer
