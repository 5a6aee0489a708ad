#include "bitmap/avx2.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

constexpr int kLanes = 8;
constexpr int kWides = 1;
constexpr int kBeyond = 16;

// A byte of the bitmap selects a permutation that spreads 8 entries.
template <class X>
__attribute__((always_inline)) inline __m256 spread_byte(uint64_t word, int byte, const X* entries) {
  const X* from = entries + __builtin_popcountll(word & ((uint64_t{1} << (8 * byte)) - 1));
  const uint32_t bits = word >> (8 * byte) & 255;
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.lane[bits]));
  return _mm256_and_ps(lanes_of(bits), _mm256_permutevar8x32_ps(load8(from), lanes));
}

template <class X>
__attribute__((always_inline)) inline void expand(uint64_t word, int part, const X* entries,
                                                  Wide (&x)[kWides]) {
  const __m256 halves[2] = {spread_byte(word, 2 * part, entries),
                            spread_byte(word, 2 * part + 1, entries)};
  __builtin_memcpy(x, halves, sizeof halves);
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/plain.hpp"

namespace gossamer {

template <>
const KvTilesKernels Tables<KvTilesKernels>::avx2 = {run_mark, run_pack, run_unpack,
                                                     run_decode_tiles};

}  // namespace gossamer
