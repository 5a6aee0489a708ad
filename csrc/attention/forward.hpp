// The forward pass, compiled once per instruction set.
#pragma once
#include "attention/chunks.hpp"

namespace gossamer {
namespace {

constexpr int kStrip = 6;                        // queries that meet a chunk at once
constexpr int kWidth = kLanes == 16 ? 4 : 2;     // vectors of sums for each of them
constexpr int kVectors = kChunk / kLanes;        // of a row of logits
constexpr int kParts = kPanel / kLanes;          // of a panel
constexpr float kSlack = 8;  // maxima follow only where weights would pass 2^8

// One block of queries: what is known of each after the keys so far.
struct Block {
  float* query;       // (rows, depth) units
  float* sums;        // (rows, padded): values times weights
  float* maxima;      // (rows): what logits are taken relative to
  float* totals;      // (rows, kLanes): sums of weights
  const int32_t* positions;  // of its queries, or null
  int64_t depth, padded, bit_step;
  float scale;        // of products, log2(e) with it
};

// S (R, kChunk) = products of R rows, `row` apart, with the keys of a chunk.
template <int R>
void strip_products(const float* query, int64_t row, int64_t depth, const float* const* panels,
                    int count, float* s) {
  const auto vectors = [&](auto width, int from) {
    constexpr int C = decltype(width)::value;
    const float* b[C];
    for (int c = 0; c < C; ++c)
      b[c] = panels[(from + c) / kParts] + (from + c) % kParts * kLanes;
    Lanes sums[R][C] = {};
    add_products<R, C>(query, row, 1, b, kPanel, depth, sums);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) put(sums[r][c], s + r * kChunk + (from + c) * kLanes);
  };
  int from = 0;
  const int end = count * kParts;
  for (; from + kWidth <= end; from += kWidth) vectors(Constant<kWidth>{}, from);
  for (; from < end; ++from) vectors(Constant<1>{}, from);
}

// out (R rows, `row` apart) += weights (R, kChunk / kPer units) times the panels' rows.
template <int R>
void strip_sums(const float* weights, const float* const* panels, int count, int64_t padded,
                float* out) {
  const auto columns = [&](auto width, int64_t from) {
    constexpr int C = decltype(width)::value;
    Lanes sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = at(out + r * padded + from + c * kLanes);
    for (int p = 0; p < count; ++p) {
      const float* b[C];
      for (int c = 0; c < C; ++c) b[c] = panels[p] + from + c * kLanes;
      add_products<R, C>(weights + p * (kPanel / kPer), kChunk / kPer, 1, b, padded, kPanel / kPer,
                         sums);
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) put(sums[r][c], out + r * padded + from + c * kLanes);
  };
  int64_t from = 0;
  for (; from + kWidth * kLanes <= padded; from += kWidth * kLanes)
    columns(Constant<kWidth>{}, from);
  for (; from < padded; from += kLanes) columns(Constant<1>{}, from);
}

// The same where values may be infinite or NaN: weights of 0 read nothing.
inline void careful_sums(const float* weights, int rows, const float* const* panels, int count,
                         int64_t padded, float* out) {
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < count * kPanel; ++k) {
      const float weight = weight_at(weights + r * (kChunk / kPer), k);
      if (weight == 0) continue;
      const float* values = panels[k / kPanel] + k % kPanel / kPer * padded;
      for (int64_t j = 0; j < padded; ++j) out[r * padded + j] += weight * number_at(values + j, k);
    }
}

// A row of logits to weights: scaled, biased, masked, and relative to the row's maximum so far.
// Returns with the row's sums and total rescaled where the maximum moved.
inline void weigh(const Block& block, const Chunk& c, int64_t row, const float* s, float* weights) {
  const int count = c.panels * kParts;
  if (count < kParts) return;
  const Lanes scale = filled(block.scale);
  Lanes x[kVectors];
  for (int v = 0; v < count; ++v) {
    x[v] = at(s + v * kLanes) * scale;
    if (c.biased) x[v] += at(c.bias + v * kLanes);
  }
  if (c.masked)
    for (int p = 0; p < c.panels; ++p) {
      const int32_t position = block.positions ? block.positions[row] : 0;
      const uint32_t bits = seen(c, p, row, block.bit_step, position);
      for (int i = 0; i < kParts; ++i)
        x[p * kParts + i] = keep(x[p * kParts + i], bits >> (i * kLanes));
    }
  Lanes top = x[0];
  for (int v = 1; v < count; ++v) top = greater(top, x[v]);
  float highest = block.maxima[row];
  if (any_above(top, filled(highest + kSlack))) {
    const float now = greatest(top), factor = power_of(highest - now);
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      float* sums = block.sums + row * block.padded + j;
      put(at(sums) * factor, sums);
    }
    float* total = block.totals + row * kLanes;
    put(at(total) * factor, total);
    block.maxima[row] = highest = now;
  }
  Lanes total = at(block.totals + row * kLanes);
  const Lanes base = filled(highest);
  for (int v = 0; v < count; ++v) {
    x[v] = power(x[v] - base);
    total += x[v];
  }
  put(total, block.totals + row * kLanes);
  store_weights(x, count, weights);
}

template <int R>
void strip(const Block& block, const Chunk& c, int64_t row) {
  alignas(64) float s[R * kChunk];
  alignas(64) float weights[R * kChunk / kPer];
  strip_products<R>(block.query + row * block.depth, block.depth, block.depth, c.across, c.panels,
                    s);
  for (int r = 0; r < R; ++r)
    weigh(block, c, row + r, s + r * kChunk, weights + r * (kChunk / kPer));
  float* out = block.sums + row * block.padded;
  if (c.odd) careful_sums(weights, R, c.along, c.panels, block.padded, out);
  else strip_sums<R>(weights, c.along, c.panels, block.padded, out);
}

// Calls with the number of rows as a constant, strip by strip.
template <class F>
void strips(int64_t from, int64_t to, F&& call) {
  for (; from + kStrip <= to; from += kStrip) call(Constant<kStrip>{}, from);
  switch (to - from) {
    case 5: return call(Constant<5>{}, from);
    case 4: return call(Constant<4>{}, from);
    case 3: return call(Constant<3>{}, from);
    case 2: return call(Constant<2>{}, from);
    case 1: return call(Constant<1>{}, from);
  }
}

// Fetches a part of a chunk into the second-level cache.
inline void fetch(const Block& block, const Chunk& c, int64_t part, int64_t parts) {
  const int64_t across = block.depth, along = kPanel / kPer * block.padded / 16;
  for (int p = 0; p < c.panels; ++p) {
    for (int64_t i = across * part / parts; i < across * (part + 1) / parts; ++i)
      __builtin_prefetch(c.across[p] + 16 * i, 0, 2);
    for (int64_t i = along * part / parts; i < along * (part + 1) / parts; ++i)
      __builtin_prefetch(c.along[p] + 16 * i, 0, 2);
  }
}

inline void attend(const Block& block, const Chunk& c, const Chunk* next, int64_t from,
                   int64_t to) {
  const int64_t parts = (to - from + kStrip - 1) / kStrip;
  strips(from, to, [&](auto rows, int64_t row) {
    if (next) fetch(block, *next, (row - from) / kStrip, parts);
    strip<decltype(rows)::value>(block, c, row);
  });
}

}  // namespace
}  // namespace gossamer
