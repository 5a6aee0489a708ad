// Dense entries to tiles and back, compiled once per instruction set.
#pragma once
#include <omp.h>

#include "attention/panels.hpp"
#include "kv_tiles/kv_tiles.hpp"

namespace gossamer {
namespace {

// Where the first entry of a block's tile lies, counted from the block's first token, in rows `row`
// numbers apart.
inline int64_t first_entry(const TilesOf& t, int64_t tile, int64_t row) {
  return t.keys ? tile : tile % kTile * row + tile / kTile * kTile;
}

inline void run_mark(const TilesOf& t, const uint8_t* mask, uint64_t* bitmaps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < t.units(); ++unit) {
    const uint8_t* from = mask + unit * kTile * t.width;
    uint64_t* to = bitmaps + unit * t.tiles();
    for (int64_t tile = 0; tile < t.tiles(); ++tile) to[tile] = 0;
    for (int64_t i = 0; i < kTile; ++i) {
      const uint8_t* row = from + i * t.width;
      if (t.keys) {
        for (int64_t c = 0; c < t.width; ++c) to[c] |= static_cast<uint64_t>(row[c] != 0) << i;
        continue;
      }
      for (int64_t c = 0; c < t.width; ++c)
        to[c / kTile * kTile + i] |= static_cast<uint64_t>(row[c] != 0) << (c % kTile);
    }
  }
}

template <class X>
void pack_of(const TilesOf& t, const Heads& x, const uint64_t* bitmaps, const int32_t* offsets,
             X* values, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < t.units(); ++unit) {
    const int64_t block = unit % t.blocks, head = unit / t.blocks;
    const X* from = row_of<X>(x, head / t.heads, head % t.heads, block * kTile);
    for (int64_t tile = 0; tile < t.tiles(); ++tile) {
      const int64_t at = unit * t.tiles() + tile;
      const X* first = from + first_entry(t, tile, x.row);
      const int64_t step = t.keys ? x.row : 1;
      X* to = values + offsets[at] * kStep;
      for (uint64_t word = bitmaps[at]; word; word &= word - 1)
        *to++ = first[__builtin_ctzll(word) * step];
    }
  }
}

template <class X>
void unpack_of(const TilesOf& t, const Tiles& tiles, X* x, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < t.units(); ++unit) {
    X* to = x + unit * kTile * t.width;
    for (int64_t j = 0; j < kTile * t.width; ++j) to[j] = 0;
    for (int64_t tile = 0; tile < t.tiles(); ++tile) {
      const int64_t at = unit * t.tiles() + tile;
      X* first = to + first_entry(t, tile, t.width);
      const int64_t step = t.keys ? t.width : 1;
      const X* from = static_cast<const X*>(tiles.values) + tiles.offsets[at] * kStep;
      for (uint64_t word = tiles.bitmaps[at]; word; word &= word - 1)
        first[__builtin_ctzll(word) * step] = *from++;
    }
  }
}

inline void run_pack(const TilesOf& t, const Heads& x, const uint64_t* bitmaps,
                     const int32_t* offsets, void* values, int threads) {
  if (t.bf16) return pack_of(t, x, bitmaps, offsets, static_cast<uint16_t*>(values), threads);
  pack_of(t, x, bitmaps, offsets, static_cast<float*>(values), threads);
}

inline void run_unpack(const TilesOf& t, const Tiles& tiles, void* x, int threads) {
  if (t.bf16) return unpack_of(t, tiles, static_cast<uint16_t*>(x), threads);
  unpack_of(t, tiles, static_cast<float*>(x), threads);
}

}  // namespace
}  // namespace gossamer
