// The driver with sums whose places are the lanes in order.
#pragma once
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

template <class X>
void take_sums(const float* from, Wide (&sums)[kWides]) {
  for (int c = 0; c < kWides; ++c) sums[c] = load(from + 16 * c);
}

template <class X>
void put_sums(const Wide (&sums)[kWides], float* to) {
  for (int c = 0; c < kWides; ++c) store(sums[c], to + 16 * c);
}

}  // namespace
}  // namespace gossamer

#include "kv_tiles/driver.hpp"

namespace gossamer {
namespace {

inline void run_decode_tiles(const TiledTask& t, void* output, float* lse, int threads) {
  if (t.bf16) return decode_tiles(t, static_cast<uint16_t*>(output), lse, threads);
  decode_tiles(t, static_cast<float*>(output), lse, threads);
}

}  // namespace
}  // namespace gossamer
