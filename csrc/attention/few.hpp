// One query and single keys, read where they lie: for small groups of queries, and for decoding.
#pragma once
#include "attention/chunks.hpp"

namespace gossamer {
namespace {

// Single keys that a query may see, and what is added to their logits.
template <class X>
struct Keys {
  const X *keys[kChunk], *values[kChunk];
  float bias[kChunk];
  int64_t token[kChunk];
  int count;
};

// Queries that see the same keys, and what is known of each after the keys so far; see Block. Row
// r lies r * step (or gap, or 1) numbers behind the first.
struct Rows {
  const float* queries;  // float32
  float* sums;           // (width of values) each
  float *maxima, *totals;
  int64_t step, gap;     // of queries, of sums
};

template <class X>
void fetch_row(const X* row, int64_t width) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < width * static_cast<int64_t>(sizeof(X)); b += 64)
    __builtin_prefetch(at + b, 0, 2);
}

// Products of R queries with the 16 / R keys from `k` on: lane i * R + r is that of key k + i.
template <int R, class X>
__attribute__((always_inline)) inline Wide dots(const float* queries, int64_t step,
                                                const X* const* rows, int count, int64_t width) {
  const int64_t whole = width / 16 * 16;
  Wide v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16 / R; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) v[i * R + r] = Wide{};
    if (i >= count) continue;
    for (int64_t j = 0; j < whole; j += 16) {
      const Wide x = load(rows[i] + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) v[i * R + r] += load(queries + r * step + j) * x;
    }
  }
  Wide found = sums_of(v);
  for (int64_t j = whole; j < width; ++j)
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < R; ++r) found[i * R + r] += queries[r * step + j] * widen(rows[i][j]);
  return found;
}

// The sums of R rows += the weighted values. Values that are not finite reach only those who give
// them a weight.
template <int R, class X>
void add_rows(const float (&weights)[R][kChunk], const Keys<X>& keys, int64_t width, float* sums,
              int64_t gap) {
  const auto vectors = [&](auto count, int64_t j) {
    constexpr int C = decltype(count)::value;
    Wide s[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) s[r][c] = load(sums + r * gap + j + 16 * c);
    for (int k = 0; k < keys.count; ++k) {
      Wide x[C];
      for (int c = 0; c < C; ++c) x[c] = load(keys.values[k] + j + 16 * c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (weights[r][k] == 0) continue;
        for (int c = 0; c < C; ++c) s[r][c] += weights[r][k] * x[c];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(s[r][c], sums + r * gap + j + 16 * c);
  };
  int64_t j = 0;
  for (; j + 64 <= width; j += 64) vectors(Constant<4>{}, j);
  for (; j + 16 <= width; j += 16) vectors(Constant<1>{}, j);
  for (; j < width; ++j)
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < keys.count; ++k)
        if (weights[r][k] != 0) sums[r * gap + j] += weights[r][k] * widen(keys.values[k][j]);
}

// The keys of `next` are fetched meanwhile.
template <int R, class X>
void attend_few(const Rows& rows, const Keys<X>& keys, const Keys<X>* next, float scale,
                int64_t width, int64_t value_width) {
  alignas(64) float weights[R][kChunk];
  constexpr int kStep = 16 / R;
  for (int k = 0; k < keys.count; k += kStep) {
    const int count = static_cast<int>(least(kStep, keys.count - k));
    for (int i = k; next && i < k + kStep && i < next->count; ++i)
      fetch_row(next->keys[i], width), fetch_row(next->values[i], value_width);
    alignas(64) float found[16];
    store(dots<R>(rows.queries, rows.step, keys.keys + k, count, width) * scale, found);
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < R; ++r) weights[r][k + i] = found[i * R + r] + keys.bias[k + i];
  }
  for (int r = 0; r < R; ++r) {
    for (int k = keys.count; k < kChunk; ++k) weights[r][k] = -INFINITY;
    Lanes top = at(weights[r]);
    for (int k = kLanes; k < keys.count; k += kLanes) top = greater(top, at(weights[r] + k));
    float& highest = rows.maxima[r];
    if (any_above(top, filled(highest))) {
      const float now = greatest(top), factor = power_of(highest - now);
      for (int64_t j = 0; j < value_width; ++j) rows.sums[r * rows.gap + j] *= factor;
      rows.totals[r] *= factor;
      highest = now;
    }
    Lanes total{};
    for (int k = 0; k < keys.count; k += kLanes) {
      const Lanes weight = power(at(weights[r] + k) - highest);
      put(weight, weights[r] + k);
      total += weight;
    }
    rows.totals[r] += sum(total);
  }
  add_rows<R>(weights, keys, value_width, rows.sums, rows.gap);
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
    keys.keys[keys.count] = k, keys.values[keys.count] = v;
    keys.bias[keys.count] = bias * kLog2e, keys.token[keys.count] = token;
    keys.count++;
  }
  return at;
}

}  // namespace
}  // namespace gossamer
