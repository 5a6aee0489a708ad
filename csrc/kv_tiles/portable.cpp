#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kLanes = 4;
constexpr int kWides = 1;

template <class X>
Wide expanded(uint64_t word, int part, const X* values) {
  const X* from = values + __builtin_popcountll(word & ((uint64_t{1} << (16 * part)) - 1));
  Wide found{};
  for (uint32_t bits = word >> (16 * part) & 0xffff; bits; bits &= bits - 1)
    found[__builtin_ctz(bits)] = widen(*from++);
  return found;
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/driver.hpp"

namespace gossamer {

template <>
const KvTilesKernels Tables<KvTilesKernels>::portable = {run_mark, run_pack, run_unpack,
                                                         run_decode_tiles};

}  // namespace gossamer
