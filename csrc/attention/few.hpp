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

// Rows that R queries meet at once, so that a vector holds the products.
template <int R>
constexpr int kTogether = R == 3 ? 4 : 16 / R;

// Products of R queries with the first kTogether of `rows`, of which `count` (at least 1) are there:
// lane i * R + r is that of row i. Four rows meet a part of the queries at a time.
template <int R, class X>
__attribute__((always_inline)) inline Wide dots(const float* queries, int64_t step,
                                                const X* const* rows, int count, int64_t width) {
  constexpr int T = 4;
  const int64_t whole = width / 16 * 16;
  Wide v[16];
#pragma GCC unroll 16
  for (int k = R * kTogether<R>; k < 16; ++k) v[k] = Wide{};
#pragma GCC unroll 4
  for (int i = 0; i < kTogether<R>; i += T) {
#pragma GCC unroll 16
    for (int k = i * R; k < (i + T) * R; ++k) v[k] = Wide{};
    if (i >= count) continue;
    const X* some[T];
    for (int k = 0; k < T; ++k) some[k] = rows[i + k < count ? i + k : 0];
    for (int64_t j = 0; j < whole; j += 16) {
      Wide query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = load(queries + r * step + j);
#pragma GCC unroll 4
      for (int k = 0; k < T; ++k) {
        const Wide x = load(some[k] + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[(i + k) * R + r] += query[r] * x;
      }
    }
  }
  Wide found = sums_of(v);
  for (int64_t j = whole; j < width; ++j)
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < R; ++r) found[i * R + r] += queries[r * step + j] * widen(rows[i][j]);
  return found;
}

// The sums of R rows += the weighted values. Values that are not finite reach only those who give
// them a weight. The values of `next` are fetched meanwhile.
template <int R, class X>
void add_rows(const float (&weights)[R][kChunk], const Keys<X>& keys, const Keys<X>* next,
              int64_t width, float* sums, int64_t gap) {
  const auto vectors = [&](auto count, int64_t j) {
    constexpr int C = decltype(count)::value;
    Wide s[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) s[r][c] = load(sums + r * gap + j + 16 * c);
    for (int k = 0; k < keys.count; ++k) {
      if (next && j == 0 && k < next->count) fetch_row(next->values[k], width);
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
  if constexpr (R == 1)
    for (; j + 128 <= width; j += 128) vectors(Constant<8>{}, j);
  for (; j + 64 <= width; j += 64) vectors(Constant<4>{}, j);
  for (; j + 16 <= width; j += 16) vectors(Constant<1>{}, j);
  for (; j < width; ++j)
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < keys.count; ++k)
        if (weights[r][k] != 0) sums[r * gap + j] += weights[r][k] * widen(keys.values[k][j]);
}

// Logits of `count` keys to weights, relative to each row's maximum so far; sums and totals are
// rescaled where that moved. Logits past `count` are overwritten.
template <int R>
void to_weights(const Rows& rows, float (&weights)[R][kChunk], int count, int64_t value_width) {
  for (int r = 0; r < R; ++r) {
    for (int k = count; k < kChunk; ++k) weights[r][k] = -INFINITY;
    Lanes top = at(weights[r]);
    for (int k = kLanes; k < count; k += kLanes) top = greater(top, at(weights[r] + k));
    float& highest = rows.maxima[r];
    if (any_above(top, filled(highest))) {
      const float now = greatest(top), factor = power_of(highest - now);
      for (int64_t j = 0; j < value_width; ++j) rows.sums[r * rows.gap + j] *= factor;
      rows.totals[r] *= factor;
      highest = now;
    }
    Lanes total{};
    for (int k = 0; k < count; k += kLanes) {
      const Lanes weight = power(at(weights[r] + k) - highest);
      put(weight, weights[r] + k);
      total += weight;
    }
    rows.totals[r] += sum(total);
  }
}

// What `next` holds is fetched meanwhile.
template <int R, class X>
void attend_few(const Rows& rows, const Keys<X>& keys, const Keys<X>* next, float scale,
                int64_t width, int64_t value_width) {
  alignas(64) float weights[R][kChunk];
  constexpr int kStep = kTogether<R>;
  for (int k = 0; k < keys.count; k += kStep) {
    const int count = static_cast<int>(least(kStep, keys.count - k));
    for (int i = k; next && i < k + kStep && i < next->count; ++i)
      fetch_row(next->keys[i], width);
    alignas(64) float found[16];
    store(dots<R>(rows.queries, rows.step, keys.keys + k, count, width) * scale, found);
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < R; ++r) weights[r][k + i] = found[i * R + r] + keys.bias[k + i];
  }
  to_weights(rows, weights, keys.count, value_width);
  add_rows<R>(weights, keys, next, value_width, rows.sums, rows.gap);
}

// Goes through the keys of a list of pages; -1 where there is none.
struct Walk {
  const int32_t* pages;
  int64_t left, page, keys, inside;
  int64_t next() {
    const int64_t first = *pages < 0 ? keys : *pages * page, token = first + inside;
    if (++inside == page) inside = 0, ++pages, --left;
    return token < keys ? token : -1;
  }
};

// The next keys of a walk that a query at this position may see, up to kChunk of them.
template <class X>
void take_keys(const Heads& key, const Heads& value, int64_t batch, int64_t kv_head,
               const HeadView& head, int32_t position, Walk& walk, Keys<X>& keys) {
  const X* first_key = row_of<X>(key, batch, kv_head, 0);
  const X* first_value = row_of<X>(value, batch, kv_head, 0);
  int count = 0;
  while (walk.left && count < kChunk) {
    const int64_t token = walk.next();
    if (token < 0 || (head.key_positions && head.key_positions[token] > position)) continue;
    const float bias = head.key_bias ? head.key_bias[token] : 0.0f;
    if (bias == -INFINITY) continue;
    keys.keys[count] = first_key + token * key.row;
    keys.values[count] = first_value + token * value.row;
    keys.bias[count] = bias * kLog2e, keys.token[count] = token;
    ++count;
  }
  keys.count = count;
}

}  // namespace
}  // namespace gossamer
