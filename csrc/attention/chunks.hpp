// Chunks of up to four panels of keys, with what masks them.
#pragma once
#include "attention/panels.hpp"

namespace gossamer {
namespace {

struct Chunk {
  static constexpr int kPanels = kChunk / kPanel;
  alignas(64) float bias[kChunk];
  alignas(64) int32_t positions[kChunk];
  const float *across[kPanels], *along[kPanels];  // keys and values, packed
  const float *value_across[kPanels], *key_along[kPanels];  // of the backward pass
  const uint8_t* bits[kPanels];  // rows of a tile's mask, or null
  int64_t token[kChunk];         // which key each is
  int64_t entry[kPanels];        // in the list of blocks; -1 for gathered keys
  uint32_t live[kPanels];        // keys that are not left out
  int count[kPanels];            // keys that exist, which come first
  int panels;
  bool causal, masked, biased, odd;  // odd: a value is infinite or NaN
};

// What is the same for all chunks of one head of queries.
struct HeadView {
  const float* key_bias;  // null, or of each key
  const int32_t *query_positions, *key_positions;
};

inline HeadView view(const AttentionTask& t, int64_t batch, int64_t head) {
  HeadView found{};
  if (t.key_bias.data) found.key_bias = t.key_bias.at(batch, head, t.heads);
  if (!t.causal) return found;
  found.query_positions = t.query_positions.at(batch, head, t.heads);
  found.key_positions = t.key_positions.at(batch, head, t.heads);
  return found;
}

// The first and the last position of some queries.
struct Span {
  int32_t first, last;
};

inline Span span_of(const HeadView& head, int64_t from, int64_t to) {
  Span found{INT32_MAX, INT32_MIN};
  if (!head.query_positions) return {0, 0};
  for (int64_t i = from; i < to; ++i) {
    const int32_t at = head.query_positions[i];
    found.first = at < found.first ? at : found.first;
    found.last = at > found.last ? at : found.last;
  }
  return found;
}

inline void clear(Chunk& c) {
  c.panels = 0;
  c.causal = c.masked = c.biased = c.odd = false;
}

// Adds the panel of `count` keys whose numbers are c.token[16 * c.panels ..]. False, and nothing
// added, where no query of the span may see any of them.
inline bool add_panel(const HeadView& head, Span span, int count, float bias, const uint8_t* bits,
                      Chunk& c) {
  const int64_t* tokens = c.token + c.panels * kPanel;
  float* biases = c.bias + c.panels * kPanel;
  int32_t* positions = c.positions + c.panels * kPanel;
  uint32_t live = (1u << count) - 1;
  if (head.key_positions) {
    int32_t first = INT32_MAX, last = INT32_MIN;
    for (int i = 0; i < kPanel; ++i) {
      positions[i] = i < count ? head.key_positions[tokens[i]] : INT32_MAX;
      first = positions[i] < first ? positions[i] : first;
      last = positions[i] > last && i < count ? positions[i] : last;
    }
    if (first > span.last) return false;
    if (last > span.first) c.causal = c.masked = true;
  }
  if (head.key_bias || bias != 0) c.biased = true;
  for (int i = 0; i < kPanel; ++i) {
    biases[i] = bias;
    if (!head.key_bias || i >= count) continue;
    const float own = head.key_bias[tokens[i]];
    if (own == -INFINITY) live &= ~(1u << i);
    else biases[i] += own * kLog2e;
  }
  if (!live) return false;
  if (live != 0xffff || bits) c.masked = true;
  c.live[c.panels] = live;
  c.count[c.panels] = count;
  c.bits[c.panels] = bits;
  c.panels++;
  return true;
}

// Which keys of panel p the query of this row and position sees.
inline uint32_t seen(const Chunk& c, int p, int64_t row, int64_t bit_step, int32_t position) {
  uint32_t bits = c.live[p];
  if (c.causal) bits &= up_to(c.positions + p * kPanel, position);
  if (c.bits[p]) {
    const uint8_t* of = c.bits[p] + row * bit_step;
    bits &= of[0] | static_cast<uint32_t>(of[1]) << 8;
  }
  return bits;
}

}  // namespace
}  // namespace gossamer
