#include "bitmap/avx2.hpp"

#include "decoder/driver.hpp"

namespace gossamer {

template <>
const DecoderKernels Tables<DecoderKernels>::avx2 = {run_decode};

}  // namespace gossamer
