#include "attention/avx512_math.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kWides = 4;  // 16 sums of 4 rows stay in registers

template <class X>
__attribute__((always_inline)) inline Wide expanded(uint64_t word, int part, const X* values) {
  const X* from = values + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(word >> (16 * part)), load(from));
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/driver.hpp"

namespace gossamer {

template <>
const KvTilesKernels Tables<KvTilesKernels>::avx512 = {run_mark, run_pack, run_unpack,
                                                       run_decode_tiles};

}  // namespace gossamer
