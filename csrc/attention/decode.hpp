// Few queries over listed keys or pages.
#pragma once
#include "attention/parts.hpp"

namespace gossamer {
namespace {

constexpr int64_t kSplit = 512;  // keys of a part, so that the number of threads changes nothing

inline HeadView view(const DecodeTask& t, int64_t batch, int64_t head) {
  HeadView found{};
  if (t.key_bias.data) found.key_bias = t.key_bias.at(batch, head, t.heads);
  if (!t.causal) return found;
  found.query_positions = t.query_positions.at(batch, head, t.heads);
  found.key_positions = t.key_positions.at(batch, head, t.heads);
  return found;
}

// Heads from..to of one query, which see the same keys alike, over a part of the list.
template <class X>
void decode_heads(const DecodeTask& t, const Parts& p, int64_t unit, int64_t part, int64_t query,
                  int64_t from, int64_t to, Walk walk) {
  const int64_t batch = unit / t.kv_heads, kv_head = unit % t.kv_heads;
  const HeadView head = view(t, batch, kv_head * (t.heads / t.kv_heads) + from);
  const int32_t position = head.query_positions ? head.query_positions[query] : 0;
  Keys<X> room[2];
  const auto take = [&](Keys<X>& keys) {
    take_keys(t.key, t.value, batch, kv_head, head, position, walk, keys);
  };
  take(room[0]);
  Ahead<X>{&room[0], t.width, t.value_width}(0, kChunk);
  for (int now = 0; room[now].count; now = 1 - now) {
    Keys<X>& next = room[1 - now];
    take(next);
    few_rows(from, to, [&](auto count, int64_t g) {
      attend_few<decltype(count)::value, X>(p.of(unit, part, query * p.group + g), room[now],
                                            g == from ? &next : nullptr, t.scale * kLog2e, t.width,
                                            t.value_width);
    });
  }
}

template <class X>
void decode_part(const DecodeTask& t, const Parts& p, int64_t unit, int64_t part,
                 int64_t per_part) {
  const Walk walk{t.index + unit * t.count + part * per_part,
                  least(per_part, t.count - part * per_part), t.page, t.keys, 0};
  // Biases and positions may be given for each head, and then its keys are taken by itself.
  const int64_t together = t.key_bias.heads > t.kv_heads || t.query_positions.heads > t.kv_heads ||
                                   t.key_positions.heads > t.kv_heads
                               ? 1
                               : p.group;
  for (int64_t i = 0; i < t.queries; ++i)
    for (int64_t g = 0; g < p.group; g += together)
      decode_heads<X>(t, p, unit, part, i, g, g + together, walk);
}

template <class X>
void decode_of(const DecodeTask& t, X* output, float* lse, int threads) {
  const int64_t per_part = most(1, kSplit / t.page), count = (t.count + per_part - 1) / per_part;
  in_parts(t, count, 16, output, lse, threads, [&](const Parts& p, int64_t unit, int64_t part) {
    decode_part<X>(t, p, unit, part, per_part);
  });
}

#ifndef GOSSAMER_ATTENTION_PAIRS
inline void run_decode(const DecodeTask& t, void* output, float* lse, int threads) {
  if (t.bf16) return decode_of(t, static_cast<uint16_t*>(output), lse, threads);
  if constexpr (kPer == 1) decode_of(t, static_cast<float*>(output), lse, threads);
}
#endif

}  // namespace
}  // namespace gossamer
