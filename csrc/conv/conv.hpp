// Sparse convolutions on channels-first images, and dense depthwise ones before them.
//
// Vector lanes run over pixels, so unstructured weights cost nothing in lanes (after Fast Sparse
// ConvNets, 2019). A thread takes a range of output rows and cuts it into bands. Of a band it
// writes everything that weights multiply into scratch that stays in the second-level cache: the
// input channels of a 1x1 convolution, the shifted copies of each channel that a larger kernel
// meets, or the results of a 3x3 depthwise convolution, which are never written anywhere else. Then
// strips of the band meet all weights, their sums in registers.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int64_t kTileRows = 4, kTileCounts = 16;
constexpr int64_t kBandFloats = 1 << 17;  // of scratch for a band, in which rows of it are counted

// A kernel over images, stride_x 1 or 2. With `depthwise` weights it is 3x3, padding 1.
struct Geometry {
  int64_t images, channels, height, width;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
  int64_t out_height() const { return (height + 2 * pad_y - kernel_y) / stride_y + 1; }
  int64_t out_width() const { return (width + 2 * pad_x - kernel_x) / stride_x + 1; }
  bool plain() const {
    return kernel_y == 1 && kernel_x == 1 && stride_y == 1 && stride_x == 1 && !pad_y && !pad_x;
  }
};

// A matrix (out, depth) whose column is tap * channels + channel. Either outputs with the most kept
// weights first (counts: one per output, rows: which output), or, if tiled, tiles of 4 outputs with
// columns sorted by which of the 4 keep them (counts: 16 per tile; bit r of the place is output r).
struct Kept {
  const float* values;
  const uint16_t* columns;
  const int32_t *counts, *rows;
  int64_t out, depth;
  bool tiled;
};

// What follows a sum: the bias of its channel, then a clamp that NaN passes.
struct Epilogue {
  const float* bias;
  float low, high;
};

struct Conv {
  Geometry shape;
  const float* depthwise;  // (channels, 9), or null
  Epilogue between;  // of the depthwise convolution
  const Kept* kept;  // or null: a depthwise convolution alone
  Epilogue epilogue;
  int64_t depth() const { return kept ? kept->depth : 1; }
};

// How a thread cuts its rows, and its scratch: the band, then two padded planes.
struct Layout {
  int64_t rows, pitch, plane_row, plane;
  int64_t floats(const Conv& c) const { return c.depth() * pitch + 2 * plane + 16; }
};

inline Layout conv_layout(const Conv& c, int threads) {
  const Geometry& s = c.shape;
  const int64_t height = s.out_height(), wide = s.out_width(), all = s.images * height;
  const int64_t most = kBandFloats / (c.depth() * wide + 1) + 1;
  int64_t rows = (all + threads - 1) / threads < height ? (all + threads - 1) / threads : height;
  if (rows > most) rows = (rows + (rows + most - 1) / most - 1) / ((rows + most - 1) / most);
  Layout l;
  l.rows = rows;
  l.pitch = ((rows * wide + 15) / 16 | 1) * 16 + 32;  // lest channels meet in the same cache lines
  l.plane_row = (s.width + 2 * s.pad_x + 15) / 16 * 16 + 32;
  l.plane = ((rows - 1) * s.stride_y + s.kernel_y) * l.plane_row;
  return l;
}

struct ConvKernels {
  // scratch: conv_layout(...).floats() per thread, on a 64-byte boundary and rounded up to 16.
  void (*run)(const Conv&, const float* x, float* y, float* scratch, int threads);
};

template <>
const ConvKernels Tables<ConvKernels>::portable;
template <>
const ConvKernels Tables<ConvKernels>::avx2;
template <>
const ConvKernels Tables<ConvKernels>::avx512;

}  // namespace gossamer
