// The backward pass: P = exp(S - L) and dS = P (dO V^T - rowsum(dO O) + dL), from which all
// gradients follow. With units of bfloat16, P and dS are rounded to it for the products.
#pragma once
#include "attention/driver.hpp"

namespace gossamer {
namespace {

// What one share of the query blocks sums up.
struct Sums {
  float *keys, *values;           // (keys, padded width) each
  float *block_bias, *key_bias;   // as in AttentionGradients, or null
};

// One block of queries: rows padded to 16 numbers. Units are pairs of numbers where kPer is 2.
struct BackBlock {
  float *grad, *grad_query;       // dO (rows, padded) and the gradient of queries (rows, key_padded)
  float *plain_query;             // (rows, key_padded)
  float* grad_units;              // dO (rows, grad_step): units along a row
  float *grad_pairs, *query_pairs;  // (rows / kPer, as above): units of neighbouring rows
  float *shift, *lse;             // dL - rowsum(dO O), and L in powers of 2
  float *weights, *slopes;        // (rows, kChunk): P and dS
  float *weight_pairs, *slope_pairs;  // (rows / kPer, kChunk)
  float* key_bias;                // of this head in Sums, or null
  int64_t key_padded, grad_step;
};

// Weights and slopes of R queries for one chunk, and their share of the queries' gradient.
template <int R>
void back_strip(const AttentionTask& t, const Block& block, const BackBlock& b, const Chunk& c,
                int64_t row) {
  const int count = c.panels * kParts;
  float *weights = b.weights + row * kChunk, *slopes = b.slopes + row * kChunk;
  alignas(64) float rounded_slopes[R * kChunk / kPer];
  strip_products<R>(block.query + row * block.depth, block.depth, units(t.width), c.across,
                    c.panels, weights);
  strip_products<R>(b.grad_units + row * b.grad_step, b.grad_step, units(t.value_width),
                    c.value_across, c.panels, slopes);
  for (int r = 0; r < R; ++r) {
    float *p = weights + r * kChunk, *d = slopes + r * kChunk;
    const float lse = b.lse[row + r], shift = b.shift[row + r];
    Lanes x[kVectors];
    for (int v = 0; v < count; ++v) {
      Lanes weight = at(p + v * kLanes) * block.scale;
      if (c.biased) weight += at(c.bias + v * kLanes);
      x[v] = at(d + v * kLanes) + shift;
      if (c.masked) {
        const int32_t position = block.positions ? block.positions[row + r] : 0;
        const uint32_t bits =
            seen(c, v / kParts, row + r, block.bit_step, position) >> (v % kParts * kLanes);
        weight = keep(weight, bits);
        x[v] = only(x[v], bits);
      }
      weight = power(weight - lse);
      x[v] *= weight;
      put(weight, p + v * kLanes);
      put(x[v], d + v * kLanes);
    }
    store_weights(x, count, rounded_slopes + r * (kChunk / kPer));
  }
  float* grad = b.grad_query + row * b.key_padded;
  if (c.odd) careful_sums(rounded_slopes, R, c.key_along, c.panels, b.key_padded, grad);
  else strip_sums<R>(rounded_slopes, c.key_along, c.panels, b.key_padded, grad);
}

// Rows from..to of `plain`, as units of neighbouring rows, the others as 0.
inline void pair_rows(const float* plain, int64_t step, int64_t from, int64_t to, int64_t width,
                      float* pairs) {
  if (kPer == 1) return;
  for (int64_t row = from / 2 * 2; row < to; row += 2) {
    const float *low = plain + row * step, *high = low + step;
    for (int64_t j = 0; j < width; j += 16) {
      const Wide first = row < from ? Wide{} : load(low + j);
      const Wide second = row + 1 < to ? load(high + j) : Wide{};
      store(paired(first, second), pairs + row / 2 * step + j);
    }
  }
}

// to (R rows, wherever they lie) += the columns of `a` (rows, kChunk) times `rows` rows of b.
template <int R>
void add_turned(const float* a, const float* b, int64_t padded, int64_t rows, float* const* to) {
  const auto columns = [&](auto width, int64_t from) {
    constexpr int C = decltype(width)::value;
    Lanes sums[R][C];
    const float* across[C];
    for (int c = 0; c < C; ++c) across[c] = b + from + c * kLanes;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = at(to[r] + from + c * kLanes);
    add_products<R, C>(a, 1, kChunk, across, padded, rows, sums);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) put(sums[r][c], to[r] + from + c * kLanes);
  };
  int64_t from = 0;
  for (; from + kWidth * kLanes <= padded; from += kWidth * kLanes)
    columns(Constant<kWidth>{}, from);
  for (; from < padded; from += kLanes) columns(Constant<1>{}, from);
}

inline void back_chunk(const AttentionTask& t, const Block& block, const BackBlock& b,
                       const Chunk& c, const Sums& sums, int64_t from, int64_t to) {
  strips(from, to, [&](auto rows, int64_t row) {
    back_strip<decltype(rows)::value>(t, block, b, c, row);
  });
  pair_rows(b.weights, kChunk, from, to, c.panels * kPanel, b.weight_pairs);
  pair_rows(b.slopes, kChunk, from, to, c.panels * kPanel, b.slope_pairs);
  const int64_t first = from / kPer, count = (to + kPer - 1) / kPer - first;
  const float *weights = b.weight_pairs + first * kChunk, *slopes = b.slope_pairs + first * kChunk;
  for (int p = 0; p < c.panels; ++p) {
    strips(p * kPanel, p * kPanel + c.count[p], [&](auto rows, int64_t k) {
      constexpr int R = decltype(rows)::value;
      float *values[R], *keys[R];
      for (int r = 0; r < R; ++r) {
        values[r] = sums.values + c.token[k + r] * block.padded;
        keys[r] = sums.keys + c.token[k + r] * b.key_padded;
      }
      add_turned<R>(weights + k, b.grad_pairs + first * block.padded, block.padded, count, values);
      add_turned<R>(slopes + k, b.query_pairs + first * b.key_padded, b.key_padded, count, keys);
    });
    const bool whole = sums.block_bias && c.entry[p] >= 0;
    if (!whole && !b.key_bias) continue;
    float panel = 0;
    for (int k = p * kPanel; k < p * kPanel + c.count[p]; ++k) {
      float column = 0;
      for (int64_t r = from; r < to; ++r) column += b.slopes[r * kChunk + k];
      panel += column;
      if (b.key_bias) b.key_bias[c.token[k]] += column;
    }
    if (whole) sums.block_bias[c.entry[p]] += panel;
  }
}

template <class X>
void add_scaled(const X* from, float factor, int64_t width, float* to) {
  int64_t j = 0;
  for (; j + 16 <= width; j += 16) store(load(to + j) + load(from + j) * factor, to + j);
  for (; j < width; ++j) to[j] += widen(from[j]) * factor;
}

// A small group of queries: key by key.
template <class X>
void back_few(const AttentionTask& t, const HeadView& head, const Block& block, const BackBlock& b,
              const Sums& sums, int64_t batch, int64_t kv_head, int64_t first,
              const int32_t* tokens, int64_t count, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const int64_t row = i - first;
    const float *query = b.plain_query + row * b.key_padded, *grad = b.grad + row * block.padded;
    const int32_t position = head.query_positions ? head.query_positions[i] : 0;
    Keys<X> keys;
    alignas(64) float weights[kChunk];
    for (Walk walk{tokens, count, 1, t.keys, 0}; walk.left;) {
      take_keys(t.key, t.value, batch, kv_head, head, position, walk, keys);
      for (int k = 0; k < keys.count; k += 16) {
        const int n = static_cast<int>(least(16, keys.count - k));
        const Wide s = dots<1>(query, 0, keys.keys + k, n, t.width) * block.scale - b.lse[row];
        const Wide g = dots<1>(grad, 0, keys.values + k, n, t.value_width) + b.shift[row];
        for (int j = 0; j < 16; ++j) weights[j] = j < n ? s[j] + keys.bias[k + j] : 0;
        for (int j = 0; j < 16; j += kLanes) put(power(at(weights + j)), weights + j);
        for (int j = 0; j < n; ++j) {
          const float weight = weights[j], slope = weight * g[j];
          const int64_t token = keys.token[k + j];
          add_scaled(grad, weight, t.value_width, sums.values + token * block.padded);
          add_scaled(query, slope, t.width, sums.keys + token * b.key_padded);
          add_scaled(keys.keys[k + j], slope, t.width, b.grad_query + row * b.key_padded);
          if (b.key_bias) b.key_bias[token] += slope;
        }
      }
    }
  }
}

// Rows of the block, as float32 and with what an empty row holds left out.
template <class X>
void begin_back(const AttentionTask& t, const AttentionGradients& g, int64_t batch, int64_t h,
                int64_t first, int64_t n, Block& block, BackBlock& b) {
  const int64_t at = (batch * t.heads + h) * t.queries + first;
  for (int64_t i = 0; i < n; ++i) {
    float *query = b.plain_query + i * b.key_padded, *grad = b.grad + i * block.padded;
    const bool empty = g.lse[at + i] == -INFINITY;
    pack_plain(row_of<X>(t.query, batch, h, first + i), empty ? 0 : t.width, b.key_padded, query);
    pack_plain(row_of<X>(g.grad, batch, h, first + i), empty ? 0 : t.value_width, block.padded,
               grad);
    const X* output = row_of<X>(g.output, batch, h, first + i);
    float inner = 0;
    for (int64_t j = 0; j < t.value_width; ++j) inner += grad[j] * widen(output[j]);
    b.shift[i] = empty ? 0 : g.grad_lse[at + i] - inner;
    b.lse[i] = empty ? 0 : g.lse[at + i] * kLog2e;
    for (int64_t j = 0; j < b.key_padded; ++j) b.grad_query[i * b.key_padded + j] = 0;
    if (kPer == 1) continue;
    pack_rounded(query, t.width, block.query + i * block.depth);
    pack_rounded(grad, t.value_width, b.grad_units + i * b.grad_step);
  }
  pair_rows(b.plain_query, b.key_padded, 0, n, b.key_padded, b.query_pairs);
  pair_rows(b.grad, block.padded, 0, n, block.padded, b.grad_pairs);
}

// Memory of one thread for the backward pass, behind that of the forward pass.
inline int64_t back_size(const AttentionTask& t, int64_t padded, int64_t key_padded) {
  const int64_t rows = rounded(t.rows, 16);
  return rows * (3 * padded + 4 * key_padded + 2 + 4 * kChunk) +
         Chunk::kPanels * kPanel * (padded + key_padded) + 64;
}

inline BackBlock back_workspace(const AttentionTask& t, Workspace& w, int64_t key_padded,
                                float* memory) {
  const int64_t rows = rounded(t.rows, 16), padded = w.block.padded;
  const auto take = [&](int64_t count) {
    float* found = memory;
    memory += rounded(count, 16);
    return found;
  };
  BackBlock b{};
  b.grad = take(rows * padded);
  b.grad_query = take(rows * key_padded);
  b.plain_query = take(rows * key_padded);
  b.shift = take(rows), b.lse = take(rows);
  b.weights = take(rows * kChunk), b.slopes = take(rows * kChunk);
  b.key_padded = key_padded, b.grad_step = padded;
  b.grad_units = b.grad_pairs = b.grad;
  b.query_pairs = w.block.query = b.plain_query;
  b.weight_pairs = b.weights, b.slope_pairs = b.slopes;
  if (kPer > 1) {
    b.grad_units = take(rows * padded), b.grad_pairs = take(rows * padded);
    b.query_pairs = take(rows * key_padded), w.block.query = take(rows * key_padded);
    b.weight_pairs = take(rows * kChunk), b.slope_pairs = take(rows * kChunk);
  }
  w.block.depth = key_padded;
  w.room.value_across = take(Chunk::kPanels * kPanel * units(t.value_width));
  w.room.key_along = take(Chunk::kPanels * kPanel / kPer * key_padded);
  w.room.depth = units(t.width), w.room.value_depth = units(t.value_width);
  w.room.key_padded = key_padded;
  return b;
}

template <class X>
void back_of_block(const AttentionTask& t, const AttentionGradients& g, const Packed& p,
                   Workspace& w, BackBlock& b, Sums sums, int64_t batch, int64_t h,
                   int64_t block_at, X* grad_query) {
  const int64_t first = block_at * t.rows, last = least(first + t.rows, t.queries);
  const int64_t kv_head = h / (t.heads / t.kv_heads), n = last - first;
  const HeadView head = view(t, batch, h);
  Block& block = w.block;
  begin_back<X>(t, g, batch, h, first, n, block, b);
  block.positions = head.query_positions ? head.query_positions + first : nullptr;
  b.key_bias = nullptr;
  if (sums.key_bias) {
    const Shared<float> own{sums.key_bias, t.key_bias.batches, t.key_bias.heads, t.keys};
    b.key_bias = own.at(batch, h, t.heads);
  }
  Chunk room[2];
  listed_chunks(t, p, head, t.offsets.at(batch, h, t.heads), block_at, span_of(head, first, last),
                room, [&](const Chunk& chunk, const Chunk*) {
                  back_chunk(t, block, b, chunk, sums, 0, n);
                });
  groups_of(t, batch, h, first, last,
            [&](const int32_t* tokens, int64_t count, int64_t from, int64_t to) {
              if (to - from <= kFew)
                return back_few<X>(t, head, block, b, sums, batch, kv_head, first, tokens, count,
                                   from, to);
              gathered_chunks<X>(t, w.room, head, batch, kv_head, tokens, count,
                                 span_of(head, from, to), room[0], [&](const Chunk& chunk) {
                                   back_chunk(t, block, b, chunk, sums, from - first, to - first);
                                 });
            });
  const int64_t at = (batch * t.heads + h) * t.queries + first;
  for (int64_t i = 0; i < n; ++i)
    write_row(b.grad_query + i * b.key_padded, t.scale, t.width, grad_query + (at + i) * t.width);
}

// All that the shares of one call sum up.
struct Shares {
  Floats keys, values, block_bias, key_bias;
  int64_t key_size, value_size, entries, biases;
  Shares(const AttentionTask& t, const AttentionGradients& g, int64_t key_padded, int64_t padded)
      : keys(kGradientShares * t.keys * key_padded), values(kGradientShares * t.keys * padded),
        block_bias(g.block_bias ? kGradientShares * t.entries() : 0),
        key_bias(g.key_bias ? kGradientShares * t.key_bias.batches * t.key_bias.heads * t.keys : 0),
        key_size(t.keys * key_padded), value_size(t.keys * padded),
        entries(g.block_bias ? t.entries() : 0),
        biases(g.key_bias ? t.key_bias.batches * t.key_bias.heads * t.keys : 0) {}
  Sums of(int64_t share) const {
    return {keys.data() + share * key_size, values.data() + share * value_size,
            entries ? block_bias.data() + share * entries : nullptr,
            biases ? key_bias.data() + share * biases : nullptr};
  }
};

inline void add_shares(const float* from, int64_t size, float* to) {
  for (int64_t j = 0; j < size; ++j) {
    float total = 0;
    for (int64_t s = 0; s < kGradientShares; ++s) total += from[s * size + j];
    to[j] = total;
  }
}

template <class X>
void backward_of(const AttentionTask& t, const AttentionGradients& g, int threads) {
  Packed p{};
  p.depth = units(t.width), p.padded = rounded(t.value_width, 16);
  p.value_depth = units(t.value_width), p.key_padded = rounded(t.width, 16);
  const int64_t panels = panels_of(t), size = workspace_size(t, p.key_padded, p.padded);
  const int64_t more = back_size(t, p.padded, p.key_padded), whole = panels * kPanel;
  const Floats across(whole * p.depth), along(whole / kPer * p.padded);
  const Floats value_across(whole * p.value_depth), key_along(whole / kPer * p.key_padded);
  const Floats flags((t.key_blocks() + panels) / 4 + 2), memory((size + more) * threads);
  const Shares shares(t, g, p.key_padded, p.padded);
  p.across = across.data(), p.along = along.data();
  p.value_across = value_across.data(), p.key_along = key_along.data();
  p.used = reinterpret_cast<uint8_t*>(flags.data()), p.odd = p.used + t.key_blocks();
  for (int64_t j = 0; j < kGradientShares * shares.entries; ++j) shares.block_bias.data()[j] = 0;
  for (int64_t j = 0; j < kGradientShares * shares.biases; ++j) shares.key_bias.data()[j] = 0;
  const int64_t group = t.heads / t.kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* own = memory.data() + omp_get_thread_num() * (size + more);
    Workspace w = workspace(t, p.key_padded, p.padded, own);
    BackBlock b = back_workspace(t, w, p.key_padded, own + size);
    for (int64_t unit = 0; unit < t.batch * t.kv_heads; ++unit) {
      const int64_t batch = unit / t.kv_heads, kv_head = unit % t.kv_heads;
#pragma omp single
      mark_used(t, batch, kv_head, p.used);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < t.key_blocks(); ++j)
        if (p.used[j]) pack_block<X>(t, p, batch, kv_head, j);
#pragma omp for schedule(dynamic)
      for (int64_t share = 0; share < kGradientShares; ++share) {
        const Sums sums = shares.of(share);
        for (int64_t j = 0; j < shares.key_size; ++j) sums.keys[j] = 0;
        for (int64_t j = 0; j < shares.value_size; ++j) sums.values[j] = 0;
        for (int64_t block = share; block < t.query_blocks(); block += kGradientShares)
          for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
            back_of_block<X>(t, g, p, w, b, sums, batch, h, block, static_cast<X*>(g.query));
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < t.keys; ++k) {
        float* keys = shares.keys.data() + k * p.key_padded;
        float* values = shares.values.data() + k * p.padded;
        for (int64_t s = 1; s < kGradientShares; ++s) {
          add_scaled(keys + s * shares.key_size, 1.0f, t.width, keys);
          add_scaled(values + s * shares.value_size, 1.0f, t.value_width, values);
        }
        const int64_t row = unit * t.keys + k;
        write_row(keys, t.scale, t.width, static_cast<X*>(g.key) + row * t.width);
        write_row(values, 1.0f, t.value_width, static_cast<X*>(g.value) + row * t.value_width);
      }
    }
  }
  if (shares.entries) add_shares(shares.block_bias.data(), shares.entries, g.block_bias);
  if (shares.biases) add_shares(shares.key_bias.data(), shares.biases, g.key_bias);
}

inline void run_backward(const AttentionTask& t, const AttentionGradients& g, int threads) {
  if (t.bf16) return backward_of<uint16_t>(t, g, threads);
  if constexpr (kPer == 1) backward_of<float>(t, g, threads);
}

}  // namespace
}  // namespace gossamer
