#include "bitmap/avx512.hpp"

#include "decoder/driver.hpp"

namespace gossamer {

template <>
const DecoderKernels Tables<DecoderKernels>::avx512 = {run_decode};

}  // namespace gossamer
