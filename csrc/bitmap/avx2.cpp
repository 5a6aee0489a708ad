#include "bitmap/avx2.hpp"

#include "bitmap/driver.hpp"

namespace gossamer {

template <>
const BitmapKernels Tables<BitmapKernels>::avx2 = {run_matvec, run_spmm, run_unpack};

}  // namespace gossamer
