// Sparse convolutions, compiled once per instruction set. The including file defines kLanes (see
// lanes.hpp), and kTileVectors: how many registers wide a strip for tiles of 4 outputs is.
#pragma once
#include <omp.h>

#include "conv/bands.hpp"

namespace gossamer {
namespace {

constexpr int kRowVectors = 4;

// The strip's place in a band and in an image of the result.
struct Strip {
  const float* x;  // its first pixel in the first channel of the band
  int64_t pitch;   // floats between channels of the band
  float* y;        // its first pixel in the first channel of the result
  int64_t pixels;  // floats between channels of the result
  int64_t count;   // pixels; the last vector may be incomplete
};

template <int V>
__attribute__((always_inline)) inline void store_row(const Lanes* sums, const Epilogue& epilogue,
                                                     const Strip& strip, int64_t row) {
  float* to = strip.y + row * strip.pixels;
#pragma GCC unroll 4
  for (int v = 0; v + 1 < V; ++v)
    store_lanes(finish(sums[v], epilogue.low, epilogue.high), to + v * kLanes);
  const Lanes last = finish(sums[V - 1], epilogue.low, epilogue.high);
  store_some(last, to + (V - 1) * kLanes, strip.count - (V - 1) * kLanes);
}

// Output after output.
template <int V>
void rows_product(const Kept& m, const Epilogue& epilogue, const Strip& strip) {
  const float* values = m.values;
  const uint16_t* columns = m.columns;
  for (int64_t k = 0; k < m.out; ++k) {
    const int64_t row = m.rows[k];
    const float* const last = values + m.counts[k];
    Lanes even[V], odd[V];  // two sets of sums, for the latency of fused multiply-add
    for (int v = 0; v < V; ++v)
      even[v] = same(epilogue.bias ? epilogue.bias[row] : 0.0f), odd[v] = Lanes{};
    for (; values + 2 <= last; values += 2, columns += 2) {
      const auto* first = reinterpret_cast<const Lanes*>(strip.x + columns[0] * strip.pitch);
      const auto* second = reinterpret_cast<const Lanes*>(strip.x + columns[1] * strip.pitch);
      for (int v = 0; v < V; ++v) {
        even[v] += values[0] * first[v];
        odd[v] += values[1] * second[v];
      }
    }
    if (values < last) {
      const auto* first = reinterpret_cast<const Lanes*>(strip.x + *columns++ * strip.pitch);
      for (int v = 0; v < V; ++v) even[v] += *values * first[v];
      ++values;
    }
    for (int v = 0; v < V; ++v) even[v] += odd[v];
    store_row<V>(even, epilogue, strip, row);
  }
}

// The columns that exactly the outputs of pattern P keep.
template <int V, int P>
__attribute__((always_inline)) inline void pattern_product(const int32_t* counts,
                                                           const float*& values,
                                                           const uint16_t*& columns,
                                                           const Strip& strip,
                                                           Lanes (&sums)[kTileRows][V]) {
  for (int32_t i = 0; i < counts[P]; ++i) {
    const auto* from = reinterpret_cast<const Lanes*>(strip.x + *columns++ * strip.pitch);
    Lanes input[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) input[v] = from[v];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      if (!(P >> r & 1)) continue;
      const float weight = *values++;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += weight * input[v];
    }
  }
  if constexpr (P + 1 < kTileCounts)
    pattern_product<V, P + 1>(counts, values, columns, strip, sums);
}

// Four outputs at a time; a loaded vector serves all of them that keep its column.
template <int V>
void tiles_product(const Kept& m, const Epilogue& epilogue, const Strip& strip) {
  const float* values = m.values;
  const uint16_t* columns = m.columns;
  for (int64_t first = 0; first < m.out; first += kTileRows) {
    const int64_t rows = m.out - first < kTileRows ? m.out - first : kTileRows;
    Lanes sums[kTileRows][V];  // every loop over it unrolled, else it would live in memory
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sums[r][v] = same(epilogue.bias && r < rows ? epilogue.bias[first + r] : 0.0f);
    pattern_product<V, 1>(m.counts + first / kTileRows * kTileCounts, values, columns, strip, sums);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r)
      if (r < rows) store_row<V>(sums[r], epilogue, strip, first + r);
  }
}

template <int V>
void strip_product(int vectors, const Kept& m, const Epilogue& epilogue, const Strip& strip) {
  if (vectors < V) {
    if constexpr (V > 1) strip_product<V - 1>(vectors, m, epilogue, strip);
    return;
  }
  if constexpr (V <= kTileVectors)
    if (m.tiled) return tiles_product<V>(m, epilogue, strip);
  rows_product<V>(m, epilogue, strip);
}

// Strips of nearly equal width, since the narrowest are the slowest.
inline void band_product(const Conv& c, const Layout& l, const float* band, float* y,
                         int64_t pixels, int64_t count) {
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  const int64_t widest = c.kept->tiled ? kTileVectors : kRowVectors;
  const int64_t strips = (vectors + widest - 1) / widest;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t from = vectors * i / strips, to = vectors * (i + 1) / strips;
    const int64_t end = to * kLanes < count ? to * kLanes : count;
    const Strip strip{band + from * kLanes, l.pitch, y + from * kLanes, pixels,
                      end - from * kLanes};
    strip_product<kRowVectors>(static_cast<int>(to - from), *c.kept, c.epilogue, strip);
  }
}

// A thread's share of all output rows.
inline void run_share(const Conv& c, const Layout& l, const float* x, float* y, float* band,
                      int64_t row, int64_t last) {
  const Geometry& s = c.shape;
  const int64_t height = s.out_height(), wide = s.out_width(), pixels = height * wide;
  float* planes = band + c.depth() * l.pitch;
  for (int64_t i = 0; i < 2 * l.plane; ++i) planes[i] = 0.0f;
  const int64_t out = c.kept ? c.kept->out : s.channels;
  for (int64_t count; row < last; row += count) {
    const int64_t image = row / height, first = row % height;
    count = height - first < last - row ? height - first : last - row;
    if (count > l.rows) count = l.rows;
    const float* from = x + image * s.channels * s.height * s.width;
    float* to = y + image * out * pixels + first * wide;
    if (c.kept) {
      write_band(c, l, from, first, count, planes, band);
      band_product(c, l, band, to, pixels, count * wide);
      continue;
    }
    for (int64_t i = 0; i < s.channels; ++i) {  // through scratch, for the sake of what exceeds
      depthwise_band(c, l, from, i, first, count, planes, band);
      __builtin_memcpy(to + i * pixels, band, count * wide * sizeof(float));
    }
  }
}

inline void run_conv(const Conv& c, const float* x, float* y, float* scratch, int threads) {
  const Layout l = conv_layout(c, threads);
  const int64_t all = c.shape.images * c.shape.out_height(), size = (l.floats(c) + 15) / 16 * 16;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    run_share(c, l, x, y, scratch + i * size, all * i / n, all * (i + 1) / n);
  }
}

}  // namespace
}  // namespace gossamer
