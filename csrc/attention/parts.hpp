// Few queries over many keys: the work is split over parts of the keys, joined by log-sum-exps.
#pragma once
#include <omp.h>

#include "attention/few.hpp"

namespace gossamer {
namespace {

// A unit is a head of keys of one batch, a row is (query, head of its group). Of every unit, part
// and row: maxima and totals, then sums of `padded` numbers; and the queries of units and rows.
struct Parts {
  float *maxima, *totals, *sums, *queries;
  int64_t group, rows, count, padded, width;
  int64_t at(int64_t unit, int64_t part, int64_t row) const {
    return (unit * count + part) * rows + row;
  }
  // Rows from `row` on of a part.
  Rows of(int64_t unit, int64_t part, int64_t row) const {
    const int64_t first = at(unit, part, row);
    return {queries + (unit * rows + row) * width, sums + first * padded, maxima + first,
            totals + first, width, padded};
  }
};

// Joins the parts of one row.
template <class X>
void join(const Parts& p, int64_t unit, int64_t row, int64_t width, X* output, float* lse) {
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
    for (int64_t j = 0; j < width; ++j) sums[j] = (part ? sums[j] : 0.0f) + factor * from[j];
  }
  write_row(sums, total == 0 ? 0.0f : 1.0f / total, width, output);
  *lse = total == 0 ? -INFINITY : (highest + log2f(total)) * kLn2;
}

// Calls attend(parts, unit, part) for all, then joins. `multiple`: of the width of sums.
template <class X, class Task, class F>
void in_parts(const Task& t, int64_t count, int64_t multiple, X* output, float* lse, int threads,
              F&& attend) {
  const int64_t units = t.batch * t.kv_heads, group = t.heads / t.kv_heads;
  Parts p{};
  p.group = group, p.rows = group * t.queries, p.count = most(1, count);
  p.padded = rounded(t.value_width, multiple), p.width = rounded(t.width, 16);
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
      const int64_t unit = item / p.count, part = item % p.count, first = p.at(unit, part, 0);
      for (int64_t r = first; r < first + p.rows; ++r) p.maxima[r] = kLowest, p.totals[r] = 0;
      for (int64_t j = first * p.padded; j < (first + p.rows) * p.padded; ++j) p.sums[j] = 0;
      if (count) attend(p, unit, part);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < units * p.rows; ++row) {
      const int64_t unit = row / p.rows, own = row % p.rows;
      const int64_t to = (unit * group + own % group) * t.queries + own / group;
      join(p, unit, own, t.value_width, output + to * t.value_width, lse + to);
    }
  }
}

// Calls with the number of rows, up to 4, as a constant, and the first of them.
template <class F>
void few_rows(int64_t from, int64_t to, F&& call) {
  for (; from + 4 <= to; from += 4) call(Constant<4>{}, from);
  switch (to - from) {
    case 3: return call(Constant<3>{}, from);
    case 2: return call(Constant<2>{}, from);
    case 1: return call(Constant<1>{}, from);
  }
}

}  // namespace
}  // namespace gossamer
