// The SELL product, compiled once per instruction set. The including file defines kLanes, floats in
// a register; kVectors, the widest tile of the batch in 16 floats; kSums, registers for sums.
#pragma once
#include <omp.h>

#include "common/batch_tiles.hpp"
#include "common/lanes.hpp"
#include "sell/sell.hpp"

namespace gossamer {
namespace {

typedef float UnalignedFloat __attribute__((aligned(2), may_alias));
inline Lanes broadcast(const UnalignedFloat* value) {
  Lanes all;
#if defined(__AVX2__)
  asm("vbroadcastss %1, %0" : "=v"(all) : "m"(*value));
#else
  for (int lane = 0; lane < kLanes; ++lane) all[lane] = *value;
#endif
  return all;
}
// The upper half of the 32 bits that end with the value: one broadcast and one mask.
inline Lanes broadcast(const uint16_t* value) {
  typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
  const auto* both = reinterpret_cast<const UnalignedFloat*>(value - 1);
  return reinterpret_cast<Lanes>(reinterpret_cast<Bits>(broadcast(both)) &
                                 static_cast<int32_t>(0xffff0000));
}

// Left to itself GCC 12 loads into a register first and copies sums about.
inline void add_product(Lanes& sum, Lanes weight, const Lanes* input) {
#if defined(__FMA__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weight), "m"(*input));
#else
  sum += weight * *input;
#endif
}

// A tile of the batch has NV * 16 columns, and rows First.. of a quad are multiplied together: all
// four, or two where that many sums fill the registers.
template <int NV>
constexpr int kParts = 16 * NV / kLanes;
template <int NV>
constexpr int64_t kRows = kParts<NV> * kQuad <= kSums ? kQuad : kQuad / 2;
template <int NV>
using Sums = Lanes[kRows<NV>][kParts<NV>];

// The inputs of the column in byte `i` of a word: the byte is rotated to where its weight is the
// tile's size. The empty statement keeps the address in one register, which the decoders need to
// keep a load and its product together.
template <int NV>
inline const Lanes* column(const float* x, uint64_t word, int i) {
  constexpr int at = NV == 4 ? 8 : NV == 2 ? 7 : 6;
  const int by = (i * 8 - at) & 63;
  const uint64_t rotated = word >> by | word << ((64 - by) & 63);
  const auto* from = reinterpret_cast<const char*>(x) + (rotated & (uint64_t{0xff} << at));
  asm("" : "+r"(from));
  return reinterpret_cast<const Lanes*>(from);
}

// S columns of each row on its own.
template <class T, int NV, int First, int S>
__attribute__((always_inline)) inline void own_columns(const uint8_t*& columns, const T*& values,
                                                       const float* x, Sums<NV>& sums) {
  uint64_t word = 0;
  __builtin_memcpy(&word, columns, S * kQuad);
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int r = 0; r < kRows<NV>; ++r) {
      const int place = s * kQuad + First + r;
      const Lanes* from = column<NV>(x, word, place);
      const Lanes weight = broadcast(values + place);
#pragma GCC unroll 4
      for (int k = 0; k < kParts<NV>; ++k) add_product(sums[r][k], weight, from + k);
    }
  columns += S * kQuad;
  values += S * kQuad;
}

// kShared columns that rows 0 and 1 share, and as many of rows 2 and 3.
template <class T, int NV, int First>
__attribute__((always_inline)) inline void shared_columns(const uint8_t*& columns, const T*& values,
                                                          const float* x, Sums<NV>& sums) {
  uint64_t word;
  __builtin_memcpy(&word, columns, 2 * kShared);
#pragma GCC unroll 4
  for (int s = 0; s < kShared; ++s)
#pragma GCC unroll 2
    for (int r = 0; r < kRows<NV>; r += 2) {
      const int place = s * kQuad + First + r;
      const Lanes* from = column<NV>(x, word, place / 2);
      const Lanes first = broadcast(values + place), second = broadcast(values + place + 1);
#pragma GCC unroll 4
      for (int k = 0; k < kParts<NV>; ++k) {
        Lanes input = from[k];
#if defined(__FMA__)
        asm("" : "+v"(input));
#endif
        sums[r][k] += first * input;
        sums[r + 1][k] += second * input;
      }
    }
  columns += 2 * kShared;
  values += kShared * kQuad;
}

// Eight columns at a time where the rows keep them apart.
template <class T, int NV, int First>
__attribute__((always_inline)) inline void quad_product(const uint16_t* sizes, const uint16_t* rows,
                                                        const uint8_t*& columns, const T*& values,
                                                        const float* x, float* y) {
  Sums<NV> sums;
  Lanes* out[kRows<NV>];
#pragma GCC unroll 4
  for (int r = 0; r < kRows<NV>; ++r) {
    out[r] = reinterpret_cast<Lanes*>(y) + rows[First + r] * kParts<NV>;
#pragma GCC unroll 4
    for (int k = 0; k < kParts<NV>; ++k) sums[r][k] = out[r][k];
  }
  for (int left = sizes[0]; left > 0; left -= kShared)
    shared_columns<T, NV, First>(columns, values, x, sums);
  for (int left = sizes[1] / 8; left > 0; --left) {
    own_columns<T, NV, First, 2>(columns, values, x, sums);
    own_columns<T, NV, First, 2>(columns, values, x, sums);
    own_columns<T, NV, First, 2>(columns, values, x, sums);
    own_columns<T, NV, First, 2>(columns, values, x, sums);
  }
  if (sizes[1] & 4) {
    own_columns<T, NV, First, 2>(columns, values, x, sums);
    own_columns<T, NV, First, 2>(columns, values, x, sums);
  }
  if (sizes[1] & 2) own_columns<T, NV, First, 2>(columns, values, x, sums);
  if (sizes[1] & 1) own_columns<T, NV, First, 1>(columns, values, x, sums);
#pragma GCC unroll 4
  for (int r = 0; r < kRows<NV>; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < kParts<NV>; ++k) out[r][k] = sums[r][k];
}

template <class T, int NV>
void group_product(const uint16_t* sizes, const uint16_t*& rows, const uint8_t*& columns,
                   const T*& values, const float* x, float* y, const char*& ahead) {
  for (int i = 0; i < sizes[2]; ++i, rows += kQuad) {
#pragma GCC unroll 4
    for (int k = 0; k < NV; ++k, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    if constexpr (kRows<NV> < kQuad) {
      const uint8_t* same_columns = columns;
      const T* same_values = values;
      quad_product<T, NV, 0>(sizes, rows, same_columns, same_values, x, y);
      quad_product<T, NV, 2>(sizes, rows, columns, values, x, y);
    } else {
      quad_product<T, NV, 0>(sizes, rows, columns, values, x, y);
    }
  }
}

// Adds the product of one chunk and block with one tile of the batch. x (kColumns + 1, 16 NV), the
// last row zeros; y (chunk + 1, 16 NV), the last row no one's.
template <class T, int NV>
void block_product(const Sell& m, int64_t at, const float* x, float* y) {
  const int64_t* from = m.offsets + 4 * at;
  const uint16_t* rows = m.places + from[1];
  const uint8_t* columns = m.columns + from[2];
  const T* values = static_cast<const T*>(m.values) + from[3];
  const char* ahead = reinterpret_cast<const char*>(x + (kColumns + 1) * 16 * NV);
  for (int64_t g = from[0]; g < from[4]; ++g)
    group_product<T, NV>(m.groups + 3 * g, rows, columns, values, x, y, ahead);
}

template <class T>
void any_width(int vectors, const Sell& m, int64_t at, const float* x, float* y) {
  if (vectors == 1) return block_product<T, 1>(m, at, x, y);
  if constexpr (kVectors >= 2)
    if (vectors == 2) return block_product<T, 2>(m, at, x, y);
  if constexpr (kVectors >= 4) return block_product<T, 4>(m, at, x, y);
}

// Tiles that cover `count` rows of the batch: as wide as can be without much idle width.
struct Tile {
  int64_t first, count;
  int vectors;
};
inline int cut(int64_t count, Tile (&tiles)[kBatch / 16]) {
  int n = 0;
  for (int64_t first = 0; first < count; ++n) {
    const int64_t left = count - first;
    const int most = left > 48 ? 4 : left > 16 ? 2 : 1, vectors = most < kVectors ? most : kVectors;
    tiles[n] = {first, left < 16 * vectors ? left : 16 * vectors, vectors};
    first += tiles[n].count;
  }
  return n;
}

// First chunk of share i of n: the boundary nearest to an equal part of the weights.
inline int64_t first_chunk(const Sell& m, int i, int n) {
  const auto until = [&](int64_t chunk) { return m.offsets[4 * chunk * m.blocks() + 3] + chunk; };
  const int64_t chunks = m.chunks();
  if (i == n) return chunks;
  const double goal = static_cast<double>(until(chunks)) * i / n;
  int64_t chunk = 0;
  while (chunk < chunks && static_cast<double>(until(chunk) + until(chunk + 1)) < 2 * goal) ++chunk;
  return chunk;
}

inline void start(const Sell& m, int64_t chunk, const float* bias, int64_t width, float* y) {
  for (int64_t r = 0; r <= m.chunk; ++r) {
    const int64_t row = chunk * m.chunk + r;
    const float first = bias && r < m.chunk && row < m.rows ? bias[row] : 0.0f;
    for (int64_t k = 0; k < width; ++k) y[r * width + k] = first;
  }
}

// Share i of n of x, transposed into (tile, block, kColumns + 1, width); a block's last row is
// zeros. Sixteen rows of x are read to their end before the next sixteen, as prefetchers expect it.
template <class X>
void transpose_share(const Sell& m, const X* x, const Tile* tiles, int count, float* xt, int i,
                     int n) {
  const int64_t blocks = m.blocks(), from = blocks * i / n, to = blocks * (i + 1) / n;
  for (int t = 0; t < count; ++t) {
    const int64_t width = 16 * tiles[t].vectors;
    for (int64_t b = 0; b < width; b += 16)
      for (int64_t block = from; block < to; ++block) {
        const int64_t first = block * kColumns, left = tiles[t].count - b;
        const int64_t last = first + kColumns < m.cols ? first + kColumns : m.cols;
        float* out = xt + (tiles[t].first * blocks + block * width) * (kColumns + 1) + b;
        transpose_rows(x + (tiles[t].first + b) * m.cols, m.cols, left < 16 ? left : 16, width,
                       first, last, out - first * width);
        store(Wide{}, out + kColumns * width);
      }
  }
}

// kBatch rows of x after another; all threads turn x, then each has its own chunks of the result.
template <class X>
void run_share(const Sell& m, const Dense& d, const float* bias, bool relu, float* xt, float* yt,
               int i, int n) {
  const int64_t from = first_chunk(m, i, n), to = first_chunk(m, i + 1, n), blocks = m.blocks();
  Tile tiles[kBatch / 16];
  for (int64_t done = 0; done < d.batch; done += kBatch) {
    const int count = cut(d.batch - done < kBatch ? d.batch - done : kBatch, tiles);
    const X* x = static_cast<const X*>(d.x) + done * m.cols;
    transpose_share(m, x, tiles, count, xt, i, n);
#pragma omp barrier
    for (int64_t chunk = from; chunk < to; ++chunk) {
      for (int t = 0; t < count; ++t)
        start(m, chunk, bias, 16 * tiles[t].vectors, yt + tiles[t].first * (m.chunk + 1));
      for (int64_t block = 0; block < blocks; ++block)
        for (int t = 0; t < count; ++t) {
          const Tile& tile = tiles[t];
          const float* in = xt + (tile.first * blocks + block * tile.vectors * 16) * (kColumns + 1);
          float* out = yt + tile.first * (m.chunk + 1);
          if (m.bf16) any_width<uint16_t>(tile.vectors, m, chunk * blocks + block, in, out);
          else any_width<float>(tile.vectors, m, chunk * blocks + block, in, out);
        }
      const int64_t first = chunk * m.chunk, left = m.rows - first;
      for (int t = 0; t < count; ++t)
        transpose_out(static_cast<X*>(d.y) + (done + tiles[t].first) * m.rows + first, m.rows,
                      tiles[t].count, 16 * tiles[t].vectors, 0, left < m.chunk ? left : m.chunk,
                      relu, yt + tiles[t].first * (m.chunk + 1));
    }
#pragma omp barrier
  }
}

inline void run_sell(const Sell& m, const Dense& d, const float* bias, bool relu, float* xt,
                     float* yt, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    float* mine = yt + i * (m.chunk + 1) * kBatch;
    if (d.bf16) run_share<uint16_t>(m, d, bias, relu, xt, mine, i, n);
    else run_share<float>(m, d, bias, relu, xt, mine, i, n);
  }
}

}  // namespace
}  // namespace gossamer
