// One query and single keys, read where they lie: for small groups of queries, and for decoding.
#pragma once
#include "attention/chunks.hpp"

namespace gossamer {
namespace {

// What is known of one query after the keys so far; see Block.
struct Row {
  const float* query;  // float32
  float* sums;         // (width of values)
  float *maximum, *total;
};

template <class X>
float dot(const float* a, const X* b, int64_t from, int64_t width) {
  float found = 0;
  for (int64_t j = from; j < width; ++j) found += a[j] * widen(b[j]);
  return found;
}

// Products of a query with up to 16 rows.
template <class X>
__attribute__((always_inline)) inline Wide dots(const float* query, const X* const* rows, int count,
                                                int64_t width) {
  const int64_t whole = width / 16 * 16;
  Wide v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    v[i] = Wide{};
    if (i >= count) continue;
    for (int64_t j = 0; j < whole; j += 16) v[i] += load(query + j) * load(rows[i] + j);
  }
  Wide found = sums_of(v);
  if (whole < width)
    for (int i = 0; i < count; ++i) found[i] += dot(query, rows[i], whole, width);
  return found;
}

// sums += the weighted rows; those of weight 0 are not read.
template <class X>
void add_rows(const float* weights, const X* const* rows, int count, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + 64 <= width; j += 64) {
    Wide s[4];
    for (int c = 0; c < 4; ++c) s[c] = load(sums + j + 16 * c);
    for (int k = 0; k < count; ++k) {
      if (weights[k] == 0) continue;
      for (int c = 0; c < 4; ++c) s[c] += weights[k] * load(rows[k] + j + 16 * c);
    }
    for (int c = 0; c < 4; ++c) store(s[c], sums + j + 16 * c);
  }
  for (; j + 16 <= width; j += 16) {
    Wide s = load(sums + j);
    for (int k = 0; k < count; ++k)
      if (weights[k] != 0) s += weights[k] * load(rows[k] + j);
    store(s, sums + j);
  }
  for (; j < width; ++j)
    for (int k = 0; k < count; ++k)
      if (weights[k] != 0) sums[j] += weights[k] * widen(rows[k][j]);
}

// Single keys that one query may see, and what is added to their logits.
template <class X>
struct Keys {
  const X *keys[kChunk], *values[kChunk];
  float bias[kChunk];
  int64_t token[kChunk];
  int count;
};

template <class X>
void attend_few(const Row& row, const Keys<X>& keys, float scale, int64_t width,
                int64_t value_width) {
  alignas(64) float weights[kChunk];
  float highest = *row.maximum;
  for (int k = 0; k < keys.count; k += 16) {
    const int count = static_cast<int>(least(16, keys.count - k));
    const Wide found = dots(row.query, keys.keys + k, count, width) * scale;
    for (int i = 0; i < count; ++i) {
      weights[k + i] = found[i] + keys.bias[k + i];
      highest = weights[k + i] > highest ? weights[k + i] : highest;
    }
  }
  if (highest > *row.maximum) {
    const float factor = power_of(*row.maximum - highest);
    for (int64_t j = 0; j < value_width; ++j) row.sums[j] *= factor;
    *row.total *= factor;
    *row.maximum = highest;
  }
  for (int k = keys.count; k < kChunk; ++k) weights[k] = -INFINITY;
  Lanes total{};
  for (int k = 0; k < keys.count; k += kLanes) {
    const Lanes weight = power(at(weights + k) - highest);
    put(weight, weights + k);
    total += weight;
  }
  *row.total += sum(total);
  add_rows(weights, keys.values, keys.count, value_width, row.sums);
}

// The keys of a list that a query at this position may see, up to kChunk of them; returns how many
// entries of the list were looked at.
template <class X, class F>
int64_t take_keys(const Heads& key, const Heads& value, int64_t batch, int64_t kv_head,
                  const HeadView& head, int32_t position, int64_t count, F&& token_of,
                  Keys<X>& keys) {
  int64_t at = 0;
  keys.count = 0;
  for (; at < count && keys.count < kChunk; ++at) {
    const int64_t token = token_of(at);
    if (token < 0 || (head.key_positions && head.key_positions[token] > position)) continue;
    const float bias = head.key_bias ? head.key_bias[token] : 0.0f;
    if (bias == -INFINITY) continue;
    const X* k = row_of<X>(key, batch, kv_head, token);
    const X* v = row_of<X>(value, batch, kv_head, token);
    __builtin_prefetch(k);
    __builtin_prefetch(v);
    keys.keys[keys.count] = k, keys.values[keys.count] = v;
    keys.bias[keys.count] = bias * kLog2e, keys.token[keys.count] = token;
    keys.count++;
  }
  return at;
}

}  // namespace
}  // namespace gossamer
