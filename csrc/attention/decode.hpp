// Few queries over listed keys or pages: split over keys, joined by their log-sum-exps.
#pragma once
#include <omp.h>

#include "attention/few.hpp"

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

// The parts of all rows: maxima and totals, then sums of `padded` numbers.
struct Parts {
  float *maxima, *totals, *sums, *queries;
  int64_t group, rows, count, padded, width;  // rows: (queries, heads of a group)
  int64_t at(int64_t unit, int64_t part, int64_t row) const {
    return (unit * count + part) * rows + row;
  }
};

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
  for (int now = 0; room[now].count; now = 1 - now) {
    Keys<X>& next = room[1 - now];
    take(next);
    const auto run = [&](auto count, int64_t g) {
      const int64_t row = p.at(unit, part, query * p.group + g);
      attend_few<decltype(count)::value, X>(
          Rows{p.queries + (unit * p.rows + query * p.group + g) * p.width, p.sums + row * p.padded,
               p.maxima + row, p.totals + row, p.width, p.padded},
          room[now], g == from ? &next : nullptr, t.scale * kLog2e, t.width, t.value_width);
    };
    int64_t g = from;
    for (; g + 4 <= to; g += 4) run(Constant<4>{}, g);
    for (; g + 2 <= to; g += 2) run(Constant<2>{}, g);
    for (; g < to; ++g) run(Constant<1>{}, g);
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

// Joins the parts of one row.
template <class X>
void join(const DecodeTask& t, const Parts& p, int64_t unit, int64_t row, X* output, float* lse) {
  float highest = kLowest, total = 0;
  for (int64_t part = 0; part < p.count; ++part) {
    const float own = p.maxima[p.at(unit, part, row)];
    highest = own > highest ? own : highest;
  }
  float* sums = p.sums + p.at(unit, 0, row) * p.padded;
  for (int64_t part = 0; part < p.count; ++part) {
    const int64_t at = p.at(unit, part, row);
    const float factor = power_of(p.maxima[at] - highest), *from = p.sums + at * p.padded;
    total += factor * p.totals[at];
    for (int64_t j = 0; j < t.value_width; ++j)
      sums[j] = (part ? sums[j] : 0.0f) + factor * from[j];
  }
  write_row(sums, total == 0 ? 0.0f : 1.0f / total, t.value_width, output);
  *lse = total == 0 ? -INFINITY : (highest + log2f(total)) * kLn2;
}

template <class X>
void decode_of(const DecodeTask& t, X* output, float* lse, int threads) {
  const int64_t units = t.batch * t.kv_heads, group = t.heads / t.kv_heads;
  const int64_t per_part = most(1, kSplit / t.page);
  Parts p{};
  p.group = group, p.rows = group * t.queries, p.count = most(1, (t.count + per_part - 1) / per_part);
  p.padded = rounded(t.value_width, 16), p.width = rounded(t.width, 16);
  const int64_t all = units * p.count * p.rows;
  const Floats memory(all * (p.padded + 2) + 32 + units * p.rows * p.width);
  p.sums = memory.data();
  p.maxima = p.sums + all * p.padded, p.totals = p.maxima + all;
  p.queries = p.sums + rounded(all * (p.padded + 2), 16);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < units * p.rows; ++row) {
      const int64_t unit = row / p.rows, own = row % p.rows;
      const int64_t head = unit % t.kv_heads * group + own % group;
      pack_plain(row_of<X>(t.query, unit / t.kv_heads, head, own / group), t.width, p.width,
                 p.queries + row * p.width);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < units * p.count; ++item) {
      const int64_t unit = item / p.count, part = item % p.count;
      const int64_t first = p.at(unit, part, 0);
      for (int64_t r = first; r < first + p.rows; ++r) p.maxima[r] = kLowest, p.totals[r] = 0;
      for (int64_t j = first * p.padded; j < (first + p.rows) * p.padded; ++j) p.sums[j] = 0;
      if (t.count) decode_part<X>(t, p, unit, part, per_part);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < units * p.rows; ++row) {
      const int64_t unit = row / p.rows, own = row % p.rows;
      const int64_t to = (unit * group + own % group) * t.queries + own / group;
      join(t, p, unit, own, output + to * t.value_width, lse + to);
    }
  }
}

inline void run_decode(const DecodeTask& t, void* output, float* lse, int threads) {
  if (t.bf16) return decode_of(t, static_cast<uint16_t*>(output), lse, threads);
  if constexpr (kPer == 1) decode_of(t, static_cast<float*>(output), lse, threads);
}

}  // namespace
}  // namespace gossamer
