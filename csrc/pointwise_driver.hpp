// Sparse 1x1 convolution, compiled once per instruction set.
#pragma once
#include <omp.h>

#include "batch_tiles.hpp"
#include "pointwise.hpp"

namespace gossamer {
namespace {

// Pixels from..from + count of every channel, padded with zeros to whole vectors: aligned, and so
// close together that the first-level cache holds a block of channels.
template <int V>
void pack_strip(const float* x, int64_t channels, int64_t pixels, int64_t from, int64_t count,
                float* strip) {
  for (int64_t c = 0; c < channels; ++c) {
    const float* source = x + c * pixels + from;
    float* to = strip + c * 16 * V;
    for (int v = 0; v < V; ++v) {
      if (16 * v + 16 <= count) {
        store(load(source + 16 * v), to + 16 * v);
        continue;
      }
      for (int64_t j = 16 * v; j < 16 * v + 16; ++j) to[j] = j < count ? source[j] : 0.0f;
    }
  }
}

// Adds one block of input channels, whose strip is x, to the sums of a group.
template <int V>
void add_block(const Pointwise& m, int64_t index, const float* x, float* sums) {
  const uint16_t* rows = m.rows + index * kGroupRows;
  const int64_t* row_ptr = m.row_ptr + index * kGroupRows;
  for (int64_t k = 0; k < kGroupRows; ++k) {
    int64_t w = row_ptr[k];
    const int64_t last = row_ptr[k + 1];
    if (w == last) return;  // as for all further rows
    auto* to = reinterpret_cast<Wide*>(sums) + rows[k] * V;
    Wide even[V], odd[V];  // two sets of sums, for the latency of fused multiply-add
    for (int v = 0; v < V; ++v) even[v] = to[v], odd[v] = Wide{};
    for (; w + 2 <= last; w += 2) {
      const auto* first = reinterpret_cast<const Wide*>(x) + m.columns[w] * V;
      const auto* second = reinterpret_cast<const Wide*>(x) + m.columns[w + 1] * V;
      const Wide a = spread(m.values + w), b = spread(m.values + w + 1);
      for (int v = 0; v < V; ++v) {
        even[v] += a * first[v];
        odd[v] += b * second[v];
      }
    }
    if (w < last) {
      const auto* first = reinterpret_cast<const Wide*>(x) + m.columns[w] * V;
      const Wide a = spread(m.values + w);
      for (int v = 0; v < V; ++v) even[v] += a * first[v];
    }
    for (int v = 0; v < V; ++v) to[v] = even[v] + odd[v];
  }
}

struct Epilogue {
  const float* bias;
  float low, high;
};

// One group of output channels over one packed strip, written to y, which points at its first pixel.
template <int V>
void strip_product(const Pointwise& m, int64_t group, const float* strip, float* y, int64_t pixels,
                   int64_t count, const Epilogue& end, float* sums) {
  const int64_t first = group * kGroupRows;
  const int64_t rows = m.out - first < kGroupRows ? m.out - first : kGroupRows;
  auto* wide = reinterpret_cast<Wide*>(sums);
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v) wide[r * V + v] = Wide{} + (end.bias ? end.bias[first + r] : 0.0f);
  for (int64_t block = 0; block < m.blocks(); ++block)
    add_block<V>(m, group * m.blocks() + block, strip + block * kChannelBlock * 16 * V, sums);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = y + (first + r) * pixels;
    for (int v = 0; v < V; ++v) {
      Wide sum = wide[r * V + v];
      sum = sum < end.low ? Wide{} + end.low : sum;
      sum = sum > end.high ? Wide{} + end.high : sum;
      if (16 * v + 16 <= count) store(sum, to + 16 * v);
      else
        for (int64_t j = 16 * v; j < count; ++j) to[j] = sum[j - 16 * v];
    }
  }
}

// One strip of V vectors for the groups first..last.
template <int V>
void strip_groups(const Pointwise& m, const float* x, float* y, int64_t pixels, int64_t from,
                  int64_t first, int64_t last, const Epilogue& end, float* sums, float* strip) {
  const int64_t count = pixels - from < 16 * V ? pixels - from : 16 * V;
  pack_strip<V>(x, m.in, pixels, from, count, strip);
  for (int64_t group = first; group < last; ++group)
    strip_product<V>(m, group, strip, y + from, pixels, count, end, sums);
}

// Strips of pixels times groups of output channels, in equal numbers per thread.
inline void run_pointwise(const Pointwise& m, const float* x, float* y, int64_t images,
                          int64_t pixels, const float* bias, float low, float high, float* scratch,
                          int threads) {
  const int64_t strips = (pixels + kStrip - 1) / kStrip, groups = m.groups();
  const int64_t tasks = images * strips * groups;
  const Epilogue end{bias, low, high};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    float* sums = scratch + i * (kGroupRows + m.in) * kStrip;
    float* strip = sums + kGroupRows * kStrip;
    const int64_t last = tasks * (i + 1) / n;
    for (int64_t task = tasks * i / n, next; task < last; task = next) {
      const int64_t place = task / groups, first = task % groups;
      next = (place + 1) * groups < last ? (place + 1) * groups : last;
      const int64_t image = place / strips, from = place % strips * kStrip;
      const float* input = x + image * m.in * pixels;
      float* output = y + image * m.out * pixels;
      const int64_t stop = first + next - task;
      switch ((pixels - from + 15) / 16) {  // the last strip of an image may be narrower
        case 1:
          strip_groups<1>(m, input, output, pixels, from, first, stop, end, sums, strip);
          break;
        case 2:
          strip_groups<2>(m, input, output, pixels, from, first, stop, end, sums, strip);
          break;
        case 3:
          strip_groups<3>(m, input, output, pixels, from, first, stop, end, sums, strip);
          break;
        default:
          strip_groups<kStrip / 16>(m, input, output, pixels, from, first, stop, end, sums, strip);
      }
    }
  }
}

}  // namespace
}  // namespace gossamer
