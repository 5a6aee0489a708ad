#include "bitmap/portable.hpp"

#include "decoder/driver.hpp"

namespace gossamer {

template <>
const DecoderKernels Tables<DecoderKernels>::portable = {run_decode};

}  // namespace gossamer
