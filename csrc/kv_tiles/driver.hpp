// Attention over tiles, compiled once per instruction set. The including file defines kLanes (see
// attention/math.hpp), kWides, kBeyond, and
//   expand(uint64_t word, int part, const X* entries, Wide (&x)[kWides])
// which takes 16 * kWides places of a tile apart, from part * 16 on, 0 where none is kept. It may
// read kBeyond entries past the tile's, and put places into lanes as take_sums and put_sums do.
#pragma once
#include <vector>

#include "attention/parts.hpp"
#include "kv_tiles/packing.hpp"

namespace gossamer {
namespace {

constexpr int64_t kBlocks = 8;  // of 64 tokens; a part, so that threads change nothing

inline int64_t padded_count(uint64_t word) { return rounded(__builtin_popcountll(word), kStep); }

// Sums (R, 64), rows `gap` apart, += the factors (R, count), `step` apart, times `count` tiles.
// Where `careful`, a factor of 0 meets nothing, whatever the tile holds.
template <int R, bool careful, class X>
void add_tiles(const Word* bits, const X* entries, int64_t count, const float* factors,
               int64_t step, float* sums, int64_t gap) {
  for (int part = 0; part < 4; part += kWides) {
    Wide s[R][kWides];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) take_sums<X>(sums + r * gap + part * 16, s[r]);
    const X* from = entries;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t word = bits[i];
      __builtin_prefetch(reinterpret_cast<const char*>(from) + 2048);
      if (!careful || factors[i] != 0) {
        Wide x[kWides];
        expand(word, part, from, x);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int c = 0; c < kWides; ++c) s[r][c] += factors[r * step + i] * x[c];
      }
      from += padded_count(word);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) put_sums<X>(s[r], sums + r * gap + part * 16);
  }
}

// One block of 64 tokens of one head.
template <class X>
struct TileBlock {
  const Word *keys, *values;
  const X *key_entries, *value_entries;
};

// The entries of a head's block, copied to `room` where reading past them would leave the array.
template <class X>
const X* entries_of(const Tiles& tiles, int64_t unit, int64_t units, int64_t each, X* room) {
  const int64_t from = tiles.offsets[unit * each] * kStep;
  const int64_t to = unit + 1 < units ? tiles.offsets[(unit + 1) * each] * kStep : tiles.size;
  const X* values = static_cast<const X*>(tiles.values) + from;
  if (to + kBeyond <= tiles.size) return values;
  // Where all is empty there is no array to copy from.
  if (to > from) __builtin_memcpy(room, values, (to - from) * sizeof(X));
  return room;
}

// Numbers that two such copies need.
inline int64_t room_size(const TiledTask& t) {
  return kTile * (t.width + block_tiles(t.value_width, false)) + 2 * kBeyond;
}

template <class X>
TileBlock<X> block_of(const TiledTask& t, const TiledTokens& tokens, int64_t head, int64_t block,
                      X* room) {
  const int64_t unit = head * tokens.blocks + block, units = t.batch * t.kv_heads * tokens.blocks;
  const int64_t keys = t.width, values = block_tiles(t.value_width, false);
  return {reinterpret_cast<const Word*>(tokens.key.bitmaps + unit * keys),
          reinterpret_cast<const Word*>(tokens.value.bitmaps + unit * values),
          entries_of<X>(tokens.key, unit, units, keys, room),
          entries_of<X>(tokens.value, unit, units, values, room + kTile * keys + kBeyond)};
}

// R rows over a block; `bias` of its tokens, or null.
template <int R, class X>
void attend_tiles(const TiledTask& t, const TileBlock<X>& block, const Rows& rows,
                  const float* bias) {
  alignas(64) float weights[R][kChunk] = {};
  add_tiles<R, false>(block.keys, block.key_entries, t.width, rows.queries, rows.step, weights[0],
                      kChunk);
  bool masked = false;
  for (int k = 0; bias && k < kTile; ++k) masked |= bias[k] == -INFINITY;
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < kTile; ++k) {
      float& weight = weights[r][k];
      weight *= t.scale * kLog2e;
      if (bias) weight = bias[k] == -INFINITY ? -INFINITY : weight + bias[k] * kLog2e;
    }
  to_weights(rows, weights, kTile, t.value_width);
  const X* entries = block.value_entries;
  for (int64_t from = 0; from < t.value_width; from += kTile) {
    const Word* bits = block.values + from;
    float* sums = rows.sums + from;
    if (!masked) add_tiles<R, false>(bits, entries, kTile, weights[0], kChunk, sums, rows.gap);
    for (int r = 0; masked && r < R; ++r)
      add_tiles<1, true>(bits, entries, kTile, weights[r], kChunk, sums + r * rows.gap, 0);
    for (int64_t i = 0; i < kTile; ++i) entries += padded_count(bits[i]);
  }
}

// Biases of the tokens of one head of queries, or null.
inline const float* biases(const TiledTask& t, int64_t unit, int64_t head) {
  const int64_t group = t.heads / t.kv_heads;
  if (!t.key_bias.data) return nullptr;
  return t.key_bias.at(unit / t.kv_heads, unit % t.kv_heads * group + head, t.heads);
}

// Heads that see the same keys alike: those of a group, unless each has biases of its own.
inline int64_t alike(const TiledTask& t) {
  return t.key_bias.heads > t.kv_heads ? 1 : t.heads / t.kv_heads;
}

// The dense tokens from..to, of which `before` tokens come first.
template <class X>
void dense_part(const TiledTask& t, const Parts& p, int64_t unit, int64_t part, int64_t from,
                int64_t to, int64_t before) {
  const X* keys = row_of<X>(t.key, unit / t.kv_heads, unit % t.kv_heads, 0);
  const X* values = row_of<X>(t.value, unit / t.kv_heads, unit % t.kv_heads, 0);
  const int64_t together = alike(t);
  Keys<X> chunk;
  for (int64_t row = 0; row < p.rows; row += together) {
    const float* bias = biases(t, unit, row % p.group);
    const int64_t seen = t.causal ? t.keys - t.queries + row / p.group + 1 : t.keys;
    for (int64_t token = from, end = least(to, seen); token < end;) {
      for (chunk.count = 0; token < end && chunk.count < kChunk; ++token) {
        const float own = bias ? bias[before + token] : 0.0f;
        if (own == -INFINITY) continue;
        chunk.keys[chunk.count] = keys + token * t.key.row;
        chunk.values[chunk.count] = values + token * t.value.row;
        chunk.bias[chunk.count++] = own * kLog2e;
      }
      if (!chunk.count) continue;
      few_rows(row, row + together, [&](auto rows, int64_t r) {
        attend_few<decltype(rows)::value, X>(p.of(unit, part, r), chunk, nullptr,
                                             t.scale * kLog2e, t.width, t.value_width);
      });
    }
  }
}

struct Spot {
  const TiledTokens* tokens;
  int64_t block;
};

template <class X>
void decode_tiles(const TiledTask& t, X* output, float* lse, int threads) {
  std::vector<Spot> spots;
  for (int64_t i = 0; i < t.count; ++i)
    for (int64_t block = 0; block < t.parts[i].blocks; ++block)
      spots.push_back({t.parts + i, block});
  const int64_t blocks = static_cast<int64_t>(spots.size()), span = kBlocks * kTile;
  const int64_t tiled = (blocks + kBlocks - 1) / kBlocks, dense = (t.keys + span - 1) / span;
  const int64_t room = rounded(room_size(t), 16);
  const Floats rooms(room * threads);
  in_parts(t, tiled + dense, kTile, output, lse, threads,
           [&](const Parts& p, int64_t unit, int64_t part) {
             if (part >= tiled) {
               const int64_t from = (part - tiled) * span;
               dense_part<X>(t, p, unit, part, from, least(from + span, t.keys), blocks * kTile);
               return;
             }
             X* own = reinterpret_cast<X*>(rooms.data() + omp_get_thread_num() * room);
             const int64_t together = alike(t) > 1 ? p.rows : 1;
             for (int64_t i = part * kBlocks; i < least((part + 1) * kBlocks, blocks); ++i) {
               const auto block = block_of(t, *spots[i].tokens, unit, spots[i].block, own);
               for (int64_t row = 0; row < p.rows; row += together) {
                 const float* bias = biases(t, unit, row % p.group);
                 few_rows(row, row + together, [&](auto rows, int64_t r) {
                   attend_tiles<decltype(rows)::value, X>(t, block, p.of(unit, part, r),
                                                          bias ? bias + i * kTile : nullptr);
                 });
               }
             }
           });
}

}  // namespace
}  // namespace gossamer
