#include "attention/avx512_math.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kWides = 4;  // 16 sums of 4 rows stay in registers
constexpr int kBeyond = 16;

template <class X>
__attribute__((always_inline)) inline void expand(uint64_t word, int, const X* entries,
                                                  Wide (&x)[kWides]) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const X* from = entries + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
    x[part] = _mm512_maskz_expand_ps(static_cast<__mmask16>(word >> (16 * part)), load(from));
  }
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/plain.hpp"

namespace gossamer {

template <>
const KvTilesKernels Tables<KvTilesKernels>::avx512 = {run_mark, run_pack, run_unpack,
                                                       run_decode_tiles};

}  // namespace gossamer
