// The pattern-grouped product, compiled once per instruction set: the compiler maps the 16-wide
// vectors below to the registers there are. kVectors of them make a batch tile.
#pragma once
#include <omp.h>

#include "batch_tiles.hpp"
#include "grouped.hpp"

namespace gossamer {
namespace {

// The upper half of the 32 bits that end with the value: one broadcast and one mask.
inline Wide spread(const uint16_t* value) {
  typedef int32_t Bits __attribute__((vector_size(64)));
  int32_t both;
  __builtin_memcpy(&both, value - 1, 4);
  const Bits all = {both, both, both, both, both, both, both, both,
                    both, both, both, both, both, both, both, both};
  return reinterpret_cast<Wide>(all & static_cast<int32_t>(0xffff0000));
}

template <class T, int NV, int P>
__attribute__((always_inline)) inline void pattern(int count, const uint16_t*& columns,
                                                   const T*& values, const float* x,
                                                   Wide (&sums)[kTile][NV]) {
  for (int i = 0; i < count; ++i) {
    const auto* from = reinterpret_cast<const Wide*>(x + int64_t{*columns++} * (16 * NV));
    Wide input[NV];
#pragma GCC unroll 4
    for (int k = 0; k < NV; ++k) input[k] = from[k];
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      if (!(P >> r & 1)) continue;
      const Wide weight = spread(values++);
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) sums[r][k] += weight * input[k];
    }
  }
}

template <class T, int NV, int P>
__attribute__((always_inline)) inline void patterns(const uint16_t* counts, const uint16_t*& columns,
                                                    const T*& values, const float* x,
                                                    Wide (&sums)[kTile][NV]) {
  pattern<T, NV, P>(counts[P], columns, values, x, sums);
  if constexpr (P < 15) patterns<T, NV, P + 1>(counts, columns, values, x, sums);
}

// Every loop over sums is unrolled by order: left to itself GCC 12 keeps them in memory between
// patterns.
template <class T, int NV>
void tile_product(const uint16_t* counts, const uint16_t* columns, const T* values, const float* x,
                  float* y) {
  Wide sums[kTile][NV];
  auto* out = reinterpret_cast<Wide*>(y);
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < NV; ++k) sums[r][k] = out[r * NV + k];
  patterns<T, NV, 1>(counts, columns, values, x, sums);
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < NV; ++k) out[r * NV + k] = sums[r][k];
}

// First tile of share i of n: shares hold equal numbers of weights in the first block, which
// stands for the others.
inline int64_t first_tile(const Grouped& m, int i, int n) {
  const int64_t tiles = m.tiles();
  if (i == n || !m.blocks()) return i == n ? tiles : 0;
  const int64_t goal = (m.value_ptr[tiles] + tiles) * i / n;
  int64_t low = 0, high = tiles;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.value_ptr[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class T, int NV>
void batch_tile(const Grouped& m, const float* bias, float* xt, float* yt, int64_t from,
                int64_t to) {
  constexpr int64_t width = 16 * NV;
  const T* values = static_cast<const T*>(m.values);
  const int64_t tiles = m.tiles();
  for (int64_t r = from * kTile; r < to * kTile; ++r)
    for (int64_t k = 0; k < width; ++k) yt[r * width + k] = bias && r < m.rows ? bias[r] : 0.0f;
  for (int64_t block = 0; block < m.blocks(); ++block)
    for (int64_t t = from; t < to; ++t) {
      const int64_t at = block * tiles + t;
      tile_product<T, NV>(m.counts + at * kPatterns, m.columns + m.column_ptr[at],
                          values + m.value_ptr[at], xt + block * kBlock * width,
                          yt + t * kTile * width);
    }
}

template <class T>
void batch_dispatch(int vectors, const Grouped& m, const float* bias, float* xt, float* yt,
                    int64_t from, int64_t to) {
  if (vectors == 1) return batch_tile<T, 1>(m, bias, xt, yt, from, to);
  if constexpr (kVectors >= 4) {
    if (vectors == 2) return batch_tile<T, 2>(m, bias, xt, yt, from, to);
    if (vectors == 3) return batch_tile<T, 3>(m, bias, xt, yt, from, to);
    return batch_tile<T, 4>(m, bias, xt, yt, from, to);
  }
}

// One batch tile after another; all threads turn x, then each has its own rows of the result.
template <class X>
void run_share(const Grouped& m, const Dense& d, const float* bias, bool relu, float* xt, float* yt,
               int i, int n) {
  const int64_t from = first_tile(m, i, n), to = first_tile(m, i + 1, n);
  const int64_t last = to * kTile < m.rows ? to * kTile : m.rows;
  for (int64_t first = 0; first < d.batch; first += 16 * kVectors) {
    const int64_t left = d.batch - first;
    const int64_t count = left < 16 * kVectors ? left : 16 * kVectors;
    const int vectors = static_cast<int>((count + 15) / 16);
    turn_in(static_cast<const X*>(d.x) + first * m.cols, m.cols, count, 16 * vectors,
            m.cols * i / n, m.cols * (i + 1) / n, xt);
#pragma omp barrier
    if (m.bf16) batch_dispatch<uint16_t>(vectors, m, bias, xt, yt, from, to);
    else batch_dispatch<float>(vectors, m, bias, xt, yt, from, to);
    turn_out(static_cast<X*>(d.y) + first * m.rows, m.rows, count, 16 * vectors, from * kTile, last,
             relu, yt);
#pragma omp barrier
  }
}

inline void run_grouped(const Grouped& m, const Dense& d, const float* bias, bool relu, float* xt,
                        float* yt, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    if (d.bf16) run_share<uint16_t>(m, d, bias, relu, xt, yt, i, n);
    else run_share<float>(m, d, bias, relu, xt, yt, i, n);
  }
}

}  // namespace
}  // namespace gossamer
