#include "attention/avx512_math.hpp"
#include "attention/backward.hpp"
#include "attention/decode.hpp"

namespace gossamer {

template <>
const AttentionKernels Tables<AttentionKernels>::avx512 = {run_forward, run_backward, run_decode};

}  // namespace gossamer
