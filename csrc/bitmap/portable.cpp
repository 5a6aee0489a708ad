#include "bitmap/portable.hpp"

#include "bitmap/driver.hpp"

namespace gossamer {

template <>
const BitmapKernels Tables<BitmapKernels>::portable = {run_matvec, run_spmm, run_unpack};

}  // namespace gossamer
