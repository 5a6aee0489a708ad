// The product with blocks, compiled once per instruction set. The including file defines kSums: so
// many sums of 16 floats stay in registers, of at most kHeight rows.
#pragma once
#include <omp.h>

#include "blocks/blocks.hpp"
#include "common/batch_tiles.hpp"
#include "common/lanes.hpp"

namespace gossamer {
namespace {

constexpr int64_t kChunk = 128;  // rows of x at a time

// H rows of `count` blocks of a block row; y holds H rows of a tile of 16 * NV.
template <class T, int H, int NV, bool Narrow>
void block_row(const Blocks& m, const T* values, const int32_t* columns, int64_t count,
               const float* xt, float* y) {
  constexpr int parts = 16 * NV / kLanes;
  auto* out = reinterpret_cast<Lanes*>(y);
  Lanes sums[H][parts];
  for (int r = 0; r < H; ++r)
    for (int k = 0; k < parts; ++k) sums[r][k] = out[r * parts + k];
  const int64_t width = Narrow ? 1 : m.width;
  for (int64_t e = 0; e < count; ++e) {
    const auto* from = reinterpret_cast<const Lanes*>(xt + int64_t{columns[e]} * (16 * NV));
    for (int64_t c = 0; c < width; ++c, from += parts, values += m.height) {
      Lanes input[parts];
      for (int k = 0; k < parts; ++k) input[k] = from[k];
#pragma GCC unroll 16
      for (int r = 0; r < H; ++r) {
        const float weight = widen(values[r]);
        for (int k = 0; k < parts; ++k) sums[r][k] += weight * input[k];
      }
    }
  }
  for (int r = 0; r < H; ++r)
    for (int k = 0; k < parts; ++k) out[r * parts + k] = sums[r][k];
}

template <class T>
using BlockRow = void (*)(const Blocks&, const T*, const int32_t*, int64_t, const float*, float*);

template <class T, int H, int NV = 1>
BlockRow<T> pick(const Blocks& m, int vectors) {
  if constexpr (H * (NV + 1) <= kSums && NV < 8) {
    if (vectors > NV) return pick<T, H, NV + 1>(m, vectors);
  }
  return m.width == 1 ? block_row<T, H, NV, true> : block_row<T, H, NV, false>;
}

// How a chunk of the batch is cut: tiles of `vectors` * 16, as many as registers hold for H rows,
// and a narrower one for the rest.
struct Cut {
  int tiles, vectors, last;
  int wide(int tile) const { return 16 * (tile + 1 == tiles ? last : vectors); }
};

template <int H>
Cut cut(int64_t count) {
  constexpr int most = kSums / H < 8 ? kSums / H : 8;
  const int needed = static_cast<int>((count + 15) / 16);
  const int tiles = (needed + most - 1) / most, vectors = needed < most ? needed : most;
  return {tiles, vectors, needed - (tiles - 1) * vectors};
}

// Block rows from..to for one chunk of the batch.
template <class T, int H>
void blocks_chunk(const Blocks& m, const Cut& cut, const float* bias, const float* xt, float* yt,
                  int64_t from, int64_t to) {
  const BlockRow<T> whole = pick<T, H>(m, cut.vectors), rest = pick<T, H>(m, cut.last);
  for (int t = 0; t < cut.tiles; ++t)
    for (int64_t r = from * m.height; r < to * m.height; ++r)
      for (int64_t k = 0; k < cut.wide(t); ++k)
        yt[t * m.rows * 16 * cut.vectors + r * cut.wide(t) + k] = bias ? bias[r] : 0.0f;
  for (int64_t part = 0; part < m.parts(); ++part) {
    const int64_t *first = m.splits + part * m.block_rows(), *last = first + m.block_rows();
    for (int64_t b = from; b < to; ++b)
      for (int64_t top = 0; top < m.height; top += H)
        for (int t = 0; t < cut.tiles; ++t) {
          const T* values = static_cast<const T*>(m.values) + first[b] * m.height * m.width + top;
          const int64_t before = int64_t{t} * 16 * cut.vectors;
          float* y = yt + before * m.rows + (b * m.height + top) * cut.wide(t);
          (t + 1 == cut.tiles ? rest : whole)(m, values, m.columns + first[b], last[b] - first[b],
                                              xt + before * m.cols, y);
        }
  }
}

// First block row of share i of n: shares hold equal numbers of blocks, and a row costs too.
inline int64_t first_block_row(const Blocks& m, int i, int n) {
  if (i == n || !m.parts() || !m.block_rows()) return m.block_rows() * i / n;
  const int64_t goal = (m.splits[(m.parts() + 1) * m.block_rows() - 1] + m.block_rows()) * i / n;
  int64_t low = 0, high = m.block_rows();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.splits[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class T, int H>
void blocks_share(const Blocks& m, const float* x, float* y, int64_t batch, const float* bias,
                  float* xt, float* yt, int i, int n) {
  const int64_t from = first_block_row(m, i, n), to = first_block_row(m, i + 1, n);
  for (int64_t at = 0; at < batch; at += kChunk) {
    const int64_t count = batch - at < kChunk ? batch - at : kChunk;
    const Cut tiles = cut<H>(count);
    for (int t = 0; t < tiles.tiles; ++t) {
      const int64_t before = int64_t{t} * 16 * tiles.vectors, left = count - before;
      transpose_in(x + (at + before) * m.cols, m.cols, left < tiles.wide(t) ? left : tiles.wide(t),
                   tiles.wide(t), m.cols * i / n, m.cols * (i + 1) / n, xt + before * m.cols);
    }
#pragma omp barrier
    blocks_chunk<T, H>(m, tiles, bias, xt, yt, from, to);
    for (int t = 0; t < tiles.tiles; ++t) {
      const int64_t before = int64_t{t} * 16 * tiles.vectors, left = count - before;
      transpose_out(y + (at + before) * m.rows, m.rows, left < tiles.wide(t) ? left : tiles.wide(t),
                    tiles.wide(t), from * m.height, to * m.height, false, yt + before * m.rows);
    }
#pragma omp barrier
  }
}

// H: the rows whose sums are held at once.
template <class T, int H = 1>
void blocks_height(const Blocks& m, const float* x, float* y, int64_t batch, const float* bias,
                   float* xt, float* yt, int i, int n) {
  if constexpr (2 * H <= kHeight) {
    if (m.height > H) return blocks_height<T, 2 * H>(m, x, y, batch, bias, xt, yt, i, n);
  }
  blocks_share<T, H>(m, x, y, batch, bias, xt, yt, i, n);
}

inline void run_blocks(const Blocks& m, const float* x, float* y, int64_t batch, const float* bias,
                       float* xt, float* yt, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    if (m.bf16) blocks_height<uint16_t>(m, x, y, batch, bias, xt, yt, i, n);
    else blocks_height<float>(m, x, y, batch, bias, xt, yt, i, n);
  }
}

}  // namespace
}  // namespace gossamer
