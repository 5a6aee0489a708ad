// Attention, compiled once per instruction set. The including file defines what math.hpp asks for.
#pragma once
#include <omp.h>

#include "attention/few.hpp"
#include "attention/forward.hpp"

namespace gossamer {
namespace {

constexpr int64_t kFew = 3;  // groups of at most so many queries read keys where they lie

// The listed key blocks of one head of keys, packed; made by all threads together.
struct Packed {
  float *across, *along;              // panels of keys and of values
  float *value_across, *key_along;    // the other way round, for the backward pass; or null
  uint8_t *used, *odd;                // of each block; of each panel
  int64_t depth, padded;              // sizes of a panel's rows
  int64_t value_depth, key_padded;
};

inline int64_t panels_of(const AttentionTask& t) { return t.key_blocks() * t.block_panels(); }

// Marks the blocks that some head of queries lists.
inline void mark_used(const AttentionTask& t, int64_t batch, int64_t kv_head, uint8_t* used) {
  const int64_t group = t.heads / t.kv_heads, blocks = t.key_blocks();
  for (int64_t j = 0; j < blocks; ++j) used[j] = 0;
  const int64_t* before = nullptr;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const int64_t* offsets = t.offsets.at(batch, h, t.heads);
    if (offsets == before) continue;
    before = offsets;
    for (int64_t e = offsets[0]; e < offsets[t.query_blocks()]; ++e) used[t.blocks[e]] = 1;
  }
}

template <class X>
void pack_block(const AttentionTask& t, const Packed& p, int64_t batch, int64_t kv_head,
                int64_t block) {
  const X *keys[kPanel], *values[kPanel];
  for (int64_t i = 0; i < t.block_panels(); ++i) {
    const int64_t first = block * t.columns + i * kPanel, panel = block * t.block_panels() + i;
    const int64_t count = least(least(kPanel, t.columns - i * kPanel), t.keys - first);
    if (count <= 0) return;
    for (int64_t k = 0; k < count; ++k) {
      keys[k] = row_of<X>(t.key, batch, kv_head, first + k);
      values[k] = row_of<X>(t.value, batch, kv_head, first + k);
    }
    pack_across(keys, count, t.width, p.across + panel * kPanel * p.depth);
    p.odd[panel] = pack_along(values, count, t.value_width, p.padded,
                              p.along + panel * (kPanel / kPer) * p.padded);
    if (!p.key_along) continue;
    pack_across(values, count, t.value_width, p.value_across + panel * kPanel * p.value_depth);
    p.odd[panel] |= pack_along(keys, count, t.width, p.key_padded,
                               p.key_along + panel * (kPanel / kPer) * p.key_padded);
  }
}

// Calls with every chunk that the block list holds for this block of queries, and the one after it.
template <class F>
void listed_chunks(const AttentionTask& t, const Packed& p, const HeadView& head,
                   const int64_t* offsets, int64_t block, Span span, Chunk (&room)[2], F&& call) {
  const int64_t panels = t.block_panels();
  Chunk *c = &room[0], *before = nullptr;
  const auto done = [&] {
    if (before) call(*before, c);
    before = c;
    c = &room[c == &room[0]];
    clear(*c);
  };
  clear(*c);
  for (int64_t e = offsets[block]; e < offsets[block + 1]; ++e) {
    const int64_t column = t.blocks[e];
    const float bias = t.block_bias ? t.block_bias[e] * kLog2e : 0.0f;
    if (bias == -INFINITY) continue;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = column * t.columns + i * kPanel, panel = column * panels + i;
      const int64_t count = least(least(kPanel, t.columns - i * kPanel), t.keys - first);
      if (count <= 0) break;
      const uint8_t* bits = nullptr;
      if (t.tiles && t.tiles[e] >= 0) bits = t.masks + t.tiles[e] * t.rows * 2 * panels + 2 * i;
      const int at = c->panels;
      for (int64_t k = 0; k < kPanel; ++k) c->token[at * kPanel + k] = first + k;
      c->across[at] = p.across + panel * kPanel * p.depth;
      c->along[at] = p.along + panel * (kPanel / kPer) * p.padded;
      if (p.key_along) {
        c->value_across[at] = p.value_across + panel * kPanel * p.value_depth;
        c->key_along[at] = p.key_along + panel * (kPanel / kPer) * p.key_padded;
      }
      c->entry[at] = e;
      if (!add_panel(head, span, static_cast<int>(count), bias, bits, *c)) continue;
      c->odd |= p.odd[panel] != 0;
      if (c->panels == Chunk::kPanels) done();
    }
  }
  if (c->panels) done();
  if (before) call(*before, nullptr);
}

// Calls with chunks of gathered keys, packed into `room`: four panels of each kind in `p`.
template <class X, class F>
void gathered_chunks(const AttentionTask& t, const Packed& room, const HeadView& head,
                     int64_t batch, int64_t kv_head, const int32_t* tokens, int64_t count,
                     Span span, Chunk& c, F&& call) {
  clear(c);
  const X *keys[kPanel], *values[kPanel];
  for (int64_t from = 0; from < count; from += kPanel) {
    const int n = static_cast<int>(least(kPanel, count - from)), at = c.panels;
    for (int i = 0; i < kPanel; ++i) c.token[at * kPanel + i] = tokens[from + (i < n ? i : n - 1)];
    c.entry[at] = -1;
    if (add_panel(head, span, n, 0.0f, nullptr, c)) {
      for (int i = 0; i < n; ++i) {
        keys[i] = row_of<X>(t.key, batch, kv_head, tokens[from + i]);
        values[i] = row_of<X>(t.value, batch, kv_head, tokens[from + i]);
      }
      float* across = room.across + at * kPanel * room.depth;
      float* along = room.along + at * (kPanel / kPer) * room.padded;
      pack_across(keys, n, t.width, across);
      c.odd |= pack_along(values, n, t.value_width, room.padded, along);
      c.across[at] = across, c.along[at] = along;
      if (room.key_along) {
        float* value_across = room.value_across + at * kPanel * room.value_depth;
        float* key_along = room.key_along + at * (kPanel / kPer) * room.key_padded;
        pack_across(values, n, t.value_width, value_across);
        c.odd |= pack_along(keys, n, t.width, room.key_padded, key_along);
        c.value_across[at] = value_across, c.key_along[at] = key_along;
      }
    }
    if (c.panels && (c.panels == Chunk::kPanels || from + kPanel >= count)) {
      call(c);
      clear(c);
    }
  }
}

// Calls with each group that has queries in from..to: its keys and its queries there.
template <class F>
void groups_of(const AttentionTask& t, int64_t batch, int64_t head, int64_t from, int64_t to,
               F&& call) {
  if (!t.token_offsets.data) return;
  const int64_t* offsets = t.token_offsets.at(batch, head, t.heads);
  for (int64_t g = from / t.group; g * t.group < to; ++g)
    if (offsets[g] < offsets[g + 1])
      call(t.tokens + offsets[g], offsets[g + 1] - offsets[g], most(from, g * t.group),
           least(to, (g + 1) * t.group));
}

// Memory of one thread.
struct Workspace {
  Block block;
  float* plain;  // (rows, width): queries as float32, for the small groups
  Packed room;
};

inline int64_t workspace_size(const AttentionTask& t, int64_t depth, int64_t padded) {
  const int64_t rows = rounded(t.rows, 16);
  return rows * (depth + padded + 1 + kLanes + rounded(t.width, 16)) + 64 +
         Chunk::kPanels * kPanel * (rounded(depth, 16) + padded);
}

inline Workspace workspace(const AttentionTask& t, int64_t depth, int64_t padded, float* memory) {
  const int64_t rows = rounded(t.rows, 16);
  Workspace w{};
  const auto take = [&](int64_t count) {
    float* found = memory;
    memory += rounded(count, 16);
    return found;
  };
  w.room.across = take(Chunk::kPanels * kPanel * depth);
  w.room.along = take(Chunk::kPanels * kPanel / kPer * padded);
  w.room.depth = depth, w.room.padded = padded;
  w.block.query = take(rows * depth);
  w.block.sums = take(rows * padded);
  w.block.maxima = take(rows);
  w.block.totals = take(rows * kLanes);
  w.plain = take(rows * rounded(t.width, 16));
  w.block.depth = depth, w.block.padded = padded;
  w.block.scale = t.scale * kLog2e;
  w.block.bit_step = 2 * t.block_panels();
  return w;
}

template <class X>
void attend_group_few(const AttentionTask& t, const HeadView& head, const Workspace& w,
                      int64_t batch, int64_t h, int64_t first, const int32_t* tokens, int64_t count,
                      int64_t from, int64_t to) {
  Keys<X> keys;
  for (int64_t i = from; i < to; ++i) {
    float* query = w.plain;
    pack_plain(row_of<X>(t.query, batch, h, i), t.width, rounded(t.width, 16), query);
    float total = 0, *totals = w.block.totals + (i - first) * kLanes;
    for (int v = 0; v < kLanes; ++v) total += totals[v], totals[v] = 0;
    const Rows row{query, w.block.sums + (i - first) * w.block.padded,
                   w.block.maxima + (i - first), &total, 0, 0};
    const int32_t position = head.query_positions ? head.query_positions[i] : 0;
    for (Walk walk{tokens, count, 1, t.keys, 0}; walk.left;) {
      take_keys(t.key, t.value, batch, h / (t.heads / t.kv_heads), head, position, walk, keys);
      if (keys.count)
        attend_few<1, X>(row, keys, nullptr, w.block.scale, t.width, t.value_width);
    }
    totals[0] = total;
  }
}

// One block of queries of one head: the whole softmax.
template <class X>
void attend_block(const AttentionTask& t, const Packed& p, Workspace& w, int64_t batch, int64_t h,
                  int64_t block, X* output, float* lse) {
  const int64_t first = block * t.rows, last = least(first + t.rows, t.queries), n = last - first;
  const HeadView head = view(t, batch, h);
  Block& b = w.block;
  for (int64_t i = 0; i < n; ++i) {
    pack_query(row_of<X>(t.query, batch, h, first + i), t.width, b.query + i * b.depth);
    b.maxima[i] = kLowest;
  }
  for (int64_t j = 0; j < n * b.padded; ++j) b.sums[j] = 0;
  for (int64_t j = 0; j < n * kLanes; ++j) b.totals[j] = 0;
  b.positions = head.query_positions ? head.query_positions + first : nullptr;
  Chunk room[2];
  listed_chunks(
      t, p, head, t.offsets.at(batch, h, t.heads), block, span_of(head, first, last), room,
      [&](const Chunk& chunk, const Chunk* next) { attend(b, chunk, next, 0, n); });
  groups_of(t, batch, h, first, last,
            [&](const int32_t* tokens, int64_t count, int64_t from, int64_t to) {
              if (to - from <= kFew)
                return attend_group_few<X>(t, head, w, batch, h, first, tokens, count, from, to);
              gathered_chunks<X>(t, w.room, head, batch, h / (t.heads / t.kv_heads), tokens, count,
                                 span_of(head, from, to), room[0], [&](const Chunk& chunk) {
                                   attend(b, chunk, nullptr, from - first, to - first);
                                 });
            });
  const int64_t at = (batch * t.heads + h) * t.queries + first;
  for (int64_t i = 0; i < n; ++i) {
    const float total = sum(gossamer::at(b.totals + i * kLanes));
    write_row(b.sums + i * b.padded, total == 0 ? 0.0f : 1.0f / total, t.value_width,
              output + (at + i) * t.value_width);
    lse[at + i] = total == 0 ? -INFINITY : (b.maxima[i] + log2f(total)) * kLn2;
  }
}

template <class X>
void forward_of(const AttentionTask& t, X* output, float* lse, int threads) {
  Packed p{};
  p.depth = units(t.width), p.padded = rounded(t.value_width, 16);
  const int64_t panels = panels_of(t), size = workspace_size(t, p.depth, p.padded);
  const Floats across(panels * kPanel * p.depth), along(panels * kPanel / kPer * p.padded);
  const Floats flags((t.key_blocks() + panels) / 4 + 2), memory(size * threads);
  p.across = across.data(), p.along = along.data();
  p.used = reinterpret_cast<uint8_t*>(flags.data()), p.odd = p.used + t.key_blocks();
  const int64_t group = t.heads / t.kv_heads, items = t.query_blocks() * group;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace w = workspace(t, p.depth, p.padded, memory.data() + omp_get_thread_num() * size);
    for (int64_t unit = 0; unit < t.batch * t.kv_heads; ++unit) {
      const int64_t batch = unit / t.kv_heads, kv_head = unit % t.kv_heads;
#pragma omp single
      mark_used(t, batch, kv_head, p.used);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < t.key_blocks(); ++j)
        if (p.used[j]) pack_block<X>(t, p, batch, kv_head, j);
      // The last blocks first: where keys come before queries they have most to do.
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items; ++item)
        attend_block<X>(t, p, w, batch, kv_head * group + item % group,
                        t.query_blocks() - 1 - item / group, output, lse);
    }
  }
}

inline void run_forward(const AttentionTask& t, void* output, float* lse, int threads) {
  if (t.bf16) return forward_of(t, static_cast<uint16_t*>(output), lse, threads);
  if constexpr (kPer == 1) forward_of(t, static_cast<float*>(output), lse, threads);
}

}  // namespace
}  // namespace gossamer
