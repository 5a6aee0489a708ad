// One query and single keys, read where they lie: for small groups of queries, and for decoding.
#pragma once
#include "attention/chunks.hpp"
#ifdef GOSSAMER_ATTENTION_PAIRS
#include "attention/pairs.hpp"
#endif

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
__attribute__((always_inline)) inline void fetch_row(const X* row, int64_t width) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < width * static_cast<int64_t>(sizeof(X)); b += 64)
    __builtin_prefetch(at + b, 0, 2);
}

// Fetches what comes next, meanwhile: a key and its value together, which may lie beside each other.
// GCC leaves out calls of functions that only fetch, so these are inlined.
template <class X>
struct Ahead {
  const Keys<X>* next;  // or null
  int64_t width, value_width;
  __attribute__((always_inline)) void operator()(int from, int to) const {
    for (int i = from; next && i < to && i < next->count; ++i) {
      fetch_row(next->keys[i], width);
      fetch_row(next->values[i], value_width);
    }
  }
};

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

// The sums of R rows += the weighted values, from a channel on. Values that are not finite reach
// only those who give them a weight. Half of what is ahead is fetched, if any channel is left.
template <int R, class X>
void add_rows(const float (&weights)[R][kChunk], const Keys<X>& keys, int64_t from, int64_t width,
              float* sums, int64_t gap, const Ahead<X>& ahead) {
  const auto vectors = [&](auto count, int64_t j) {
    constexpr int C = decltype(count)::value;
    Wide s[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) s[r][c] = load(sums + r * gap + j + 16 * c);
    for (int k = 0; k < keys.count; ++k) {
      if (j == from && k % 2 == 0) ahead((kChunk + k) / 2, (kChunk + k) / 2 + 1);
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
  int64_t j = from;
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

#ifdef GOSSAMER_ATTENTION_PAIRS
// As add_rows, by pairs of keys as far as 32 channels are together.
template <int R>
void add_values(const float (&weights)[R][kChunk], const Keys<uint16_t>& keys, int64_t width,
                float* sums, int64_t gap, Ahead<uint16_t> ahead) {
  alignas(64) uint32_t pairs[R][kChunk / 2];
  constexpr int C = R == 1 ? 4 : 2;
  int64_t j = 0;
  if (pair_weights(weights, keys.count, pairs)) {
    for (; j + 32 * C <= width; j += 32 * C, ahead.next = nullptr)
      add_pairs<R, C>(pairs, keys.values, keys.count, j, sums, gap, ahead);
    for (; j + 32 <= width; j += 32, ahead.next = nullptr)
      add_pairs<R, 1>(pairs, keys.values, keys.count, j, sums, gap, ahead);
  }
  add_rows<R>(weights, keys, j, width, sums, gap, ahead);
}
#endif

// `next` may be null.
template <int R, class X>
void attend_few(const Rows& rows, const Keys<X>& keys, const Keys<X>* next, float scale,
                int64_t width, int64_t value_width) {
  const Ahead<X> ahead{next, width, value_width};
  alignas(64) float weights[R][kChunk];
  constexpr int kStep = kTogether<R>;
#ifdef GOSSAMER_ATTENTION_PAIRS
  alignas(64) uint16_t queries[R][kWidest];
  const bool pairs = width % 32 == 0 && width <= kWidest;
  if (pairs) pack_pairs(rows.queries, rows.step, width, queries);
#endif
  for (int k = 0; k < keys.count; k += kStep) {
    const int count = static_cast<int>(least(kStep, keys.count - k));
    ahead(k / 2, (k + kStep) / 2);
    Wide products;
#ifdef GOSSAMER_ATTENTION_PAIRS
    if (pairs) products = pair_dots<R, kStep>(queries, keys.keys + k, count, width);
    else
#endif
    products = dots<R>(rows.queries, rows.step, keys.keys + k, count, width);
    alignas(64) float found[16];
    store(products * scale, found);
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < R; ++r) weights[r][k + i] = found[i * R + r] + keys.bias[k + i];
  }
  to_weights(rows, weights, keys.count, value_width);
#ifdef GOSSAMER_ATTENTION_PAIRS
  add_values(weights, keys, value_width, rows.sums, rows.gap, ahead);
#else
  add_rows(weights, keys, 0, value_width, rows.sums, rows.gap, ahead);
#endif
}

// Goes through the keys of a list of pages; -1 where there is none.
struct Walk {
  const int32_t* pages;
  int64_t left, page, keys, inside;  // inside: keys of the first page that were taken already
};

// The next keys of a walk that a query at this position may see, up to kChunk of them.
template <class X>
void take_keys(const Heads& key, const Heads& value, int64_t batch, int64_t kv_head,
               const HeadView& head, int32_t position, Walk& walk, Keys<X>& keys) {
  const X* first_key = row_of<X>(key, batch, kv_head, 0);
  const X* first_value = row_of<X>(value, batch, kv_head, 0);
  int count = 0;
  while (walk.left && count < kChunk) {
    const int64_t first = *walk.pages * walk.page, from = first + walk.inside;
    const int64_t end = *walk.pages < 0 ? from : least(first + walk.page, walk.keys);
    const int64_t to = least(end, from + kChunk - count);
    for (int64_t token = from; token < to; ++token) {
      if (head.key_positions && head.key_positions[token] > position) continue;
      const float bias = head.key_bias ? head.key_bias[token] : 0.0f;
      if (bias == -INFINITY) continue;
      keys.keys[count] = first_key + token * key.row;
      keys.values[count] = first_value + token * value.row;
      keys.bias[count] = bias * kLog2e, keys.token[count] = token;
      ++count;
    }
    walk.inside = to - first;
    if (to >= end) walk.inside = 0, ++walk.pages, --walk.left;
  }
  keys.count = count;
}

}  // namespace
}  // namespace gossamer
