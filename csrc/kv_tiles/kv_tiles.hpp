// Keys and values of a cache of which few entries are kept, as bitmaps in tiles (Mustafar, 2025).
//
// A tile is 64 neighbours: of keys 64 tokens of one channel, of values 64 channels of one token. It
// is a bitmap, first in the lowest bit, and the kept entries behind each other, padded to a multiple
// of 8. Attention adds up tiles times factors either way: tiles of keys times channels of the query
// are 64 logits, tiles of values times weights of tokens are 64 channels of the output. Tiles that
// meet lie behind each other, so that all is read in one go.
#pragma once
#include <cstdint>

#include "attention/attention.hpp"
#include "common/tables.hpp"
#include "common/word.hpp"

namespace gossamer {

constexpr int64_t kTile = 64;
constexpr int64_t kStep = 8;  // values of a tile are padded to a multiple

inline int64_t tile_groups(int64_t width) { return (width + kTile - 1) / kTile; }

// Of 64 tokens: `width` tiles of keys, or tiles (groups of channels, 64 tokens) of values.
inline int64_t block_tiles(int64_t width, bool keys) {
  return keys ? width : tile_groups(width) * kTile;
}

// All tiles are (heads of all batches, blocks of 64 tokens, tiles of a block).
struct Tiles {
  const uint64_t* bitmaps;
  const int32_t* offsets;  // of the values of each tile, in steps
  const void* values;
  int64_t size;  // of the values, in numbers
};

struct TiledTokens {
  Tiles key, value;
  int64_t blocks;
};

struct TiledTask {
  Heads query, key, value;  // key and value are dense tokens behind all tiles
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  bool bf16, causal;  // causal: of the last dense tokens each query is one, and sees none behind it
  float scale;
  const TiledTokens* parts;
  int64_t count;
  Shared<const float> key_bias;  // of all tokens, tiles first
};

// Entries of (batch, heads, tokens, width).
struct TilesOf {
  int64_t batch, heads, blocks, width;
  bool keys, bf16;
  int64_t units() const { return batch * heads * blocks; }
  int64_t tiles() const { return block_tiles(width, keys); }
};

struct KvTilesKernels {
  // Bitmaps of what `mask`, contiguous, keeps.
  void (*mark)(const TilesOf&, const uint8_t* mask, uint64_t* bitmaps, int threads);
  // The values of x that bitmaps keep; zeros between the tiles are there already.
  void (*pack)(const TilesOf&, const Heads& x, const uint64_t* bitmaps, const int32_t* offsets,
               void* values, int threads);
  // The entries, zeros where none is kept; contiguous.
  void (*unpack)(const TilesOf&, const Tiles&, void* x, int threads);
  // As of attention: output of the inputs' type, lse float32.
  void (*decode)(const TiledTask&, void* output, float* lse, int threads);
};

template <>
const KvTilesKernels Tables<KvTilesKernels>::portable;
template <>
const KvTilesKernels Tables<KvTilesKernels>::avx2;
template <>
const KvTilesKernels Tables<KvTilesKernels>::avx512;

// With AVX-512's expansion of 16-bit numbers, for bfloat16 only.
void decode_tiles_bf16(const TiledTask&, void* output, float* lse, int threads);

}  // namespace gossamer
