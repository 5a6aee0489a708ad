#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kLanes = 4;
constexpr int kWides = 1;
constexpr int kBeyond = 16;

template <class X>
void expand(uint64_t word, int part, const X* entries, Wide (&x)[kWides]) {
  const X* from = entries + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
  x[0] = Wide{};
  for (uint32_t bits = word >> (16 * part) & 0xffff; bits; bits &= bits - 1)
    x[0][__builtin_ctz(bits)] = widen(*from++);
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/plain.hpp"

namespace gossamer {

template <>
const KvTilesKernels Tables<KvTilesKernels>::portable = {run_mark, run_pack, run_unpack,
                                                         run_decode_tiles};

}  // namespace gossamer
