// What a band of output rows multiplies, written into scratch; compiled once per instruction set.
// Whole vectors are written from left to right, row after row: what exceeds a row is overwritten by
// the next one, and what exceeds the band falls into the space between channels.
#pragma once
#include <cstdint>

#include "common/lanes.hpp"
#include "conv/conv.hpp"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace {

inline Lanes load_lanes(const float* from) {
  Lanes found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}
inline void store_lanes(Lanes value, float* to) { __builtin_memcpy(to, &value, sizeof value); }
inline Lanes same(float value) { return value - Lanes{}; }  // x - 0 is x, which compilers know

// The first `count` floats, and zeros.
inline Lanes load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load_lanes(from);
#if defined(__AVX512F__)
  if constexpr (kLanes == 16)
    return reinterpret_cast<Lanes>(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1), from));
#endif
  Lanes found{};
  for (int64_t j = 0; j < count; ++j) found[j] = from[j];
  return found;
}
inline void store_some(Lanes value, float* to, int64_t count) {
  if (count >= kLanes) return store_lanes(value, to);
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1),
                          reinterpret_cast<__m512>(value));
    return;
  }
#endif
  for (int64_t j = 0; j < count; ++j) to[j] = value[j];
}

inline Lanes finish(Lanes sum, float low, float high) {
  sum = sum < low ? same(low) : sum;
  return sum > high ? same(high) : sum;
}

// Every second float goes to `even`, the others to `odd`, with zeros up to whole vectors.
inline void part(const float* from, int64_t count, float* even, float* odd) {
  typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
  Places places;
  for (int k = 0; k < kLanes; ++k) places[k] = 2 * k;
  for (int64_t j = 0; j < count; j += 2 * kLanes) {
    const Lanes first = load_some(from + j, count - j);
    const Lanes second = load_some(from + j + kLanes, count - j - kLanes);
    store_lanes(__builtin_shuffle(first, second, places), even + j / 2);
    store_lanes(__builtin_shuffle(first, second, places + 1), odd + j / 2);
  }
}

// `count` rows of the padded plane from `first` on. With stride 2 its even columns go to the first
// plane and the odd ones to the second, so that the inputs of neighbouring outputs are neighbours.
// The columns of the border are zero already.
inline void pad_rows(const Geometry& s, const Layout& l, const float* x, int64_t first,
                     int64_t count, float* planes) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t source = first + r - s.pad_y;
    float *even = planes + r * l.plane_row, *odd = even + l.plane;
    if (source < 0 || source >= s.height) {
      for (int64_t j = 0; j < l.plane_row; ++j) even[j] = 0.0f;
      for (int64_t j = 0; j < l.plane_row; ++j) odd[j] = 0.0f;
    } else if (s.stride_x == 1) {
      const float* from = x + source * s.width;
      for (int64_t j = 0; j < s.width; j += kLanes)
        store_lanes(load_some(from + j, s.width - j), even + s.pad_x + j);
    } else {
      float* swapped = s.pad_x % 2 ? odd : even;
      part(x + source * s.width, s.width, swapped + s.pad_x / 2,
           (s.pad_x % 2 ? even : odd) + (s.pad_x + 1) / 2);
    }
  }
}

// The copies of one channel that the taps of the kernel meet, `step` floats apart.
inline void write_taps(const Geometry& s, const Layout& l, const float* planes, int64_t rows,
                       int64_t step, float* to) {
  const int64_t wide = s.out_width();
  for (int64_t ky = 0; ky < s.kernel_y; ++ky)
    for (int64_t kx = 0; kx < s.kernel_x; ++kx, to += step)
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = planes + (s.stride_x == 2 ? kx % 2 * l.plane + kx / 2 : kx) +
                            (r * s.stride_y + ky) * l.plane_row;
        for (int64_t j = 0; j < wide; j += kLanes)
          store_lanes(load_lanes(from + j), to + r * wide + j);
      }
}

// R output rows of a 3x3 depthwise convolution with stride S; a loaded vector serves all of them.
// From right to left, for the sake of what exceeds the rows.
template <int S, int R>
void depthwise_rows(const float* even, const float* odd, int64_t plane_row, const Lanes* taps,
                    float bias, const Epilogue& epilogue, int64_t wide, float* to) {
  for (int64_t j = (wide - 1) / kLanes * kLanes; j >= 0; j -= kLanes) {
    Lanes sums[R];
    for (int r = 0; r < R; ++r) sums[r] = same(bias);
#pragma GCC unroll 16
    for (int i = 0; i < S * (R - 1) + 3; ++i) {
      const int64_t at = i * plane_row + j;
      const Lanes left = load_lanes(even + at);
      const Lanes middle = S == 1 ? load_lanes(even + at + 1) : load_lanes(odd + at);
      const Lanes right = S == 1 ? load_lanes(even + at + 2) : load_lanes(even + at + 1);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int t = i - S * r;
        if (t < 0 || t > 2) continue;
        sums[r] += taps[3 * t] * left;
        sums[r] += taps[3 * t + 1] * middle;
        sums[r] += taps[3 * t + 2] * right;
      }
    }
    for (int r = 0; r < R; ++r)
      store_lanes(finish(sums[r], epilogue.low, epilogue.high), to + r * wide + j);
  }
}

template <int S>
void depthwise_plane(const Layout& l, const float* planes, const float* weight, float bias,
                     const Epilogue& epilogue, int64_t rows, int64_t wide, float* to) {
  Lanes taps[9];
  for (int t = 0; t < 9; ++t) taps[t] = same(weight[t]);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* at = planes + S * r * l.plane_row;
    depthwise_rows<S, 4>(at, at + l.plane, l.plane_row, taps, bias, epilogue, wide, to + r * wide);
  }
  for (; r < rows; ++r) {
    const float* at = planes + S * r * l.plane_row;
    depthwise_rows<S, 1>(at, at + l.plane, l.plane_row, taps, bias, epilogue, wide, to + r * wide);
  }
}

// The depthwise convolution of channel c on rows first.. of its output.
inline void depthwise_band(const Conv& c, const Layout& l, const float* x, int64_t channel,
                           int64_t first, int64_t rows, float* planes, float* to) {
  const Geometry& s = c.shape;
  pad_rows(s, l, x + channel * s.height * s.width, first * s.stride_y, (rows - 1) * s.stride_y + 3,
           planes);
  const float *weight = c.depthwise + 9 * channel, *bias = c.between.bias;
  const auto plane = s.stride_x == 1 ? depthwise_plane<1> : depthwise_plane<2>;
  plane(l, planes, weight, bias ? bias[channel] : 0.0f, c.between, rows, s.out_width(), to);
}

// All that the kept weights multiply in rows first.. of one image.
inline void write_band(const Conv& c, const Layout& l, const float* x, int64_t first, int64_t rows,
                       float* planes, float* band) {
  const Geometry& s = c.shape;
  for (int64_t i = 0; i < s.channels; ++i) {
    float* to = band + i * l.pitch;
    const float* plane = x + i * s.height * s.width;
    if (c.depthwise) {
      depthwise_band(c, l, x, i, first, rows, planes, to);
    } else if (s.plain()) {
      __builtin_memcpy(to, plane + first * s.width, rows * s.width * sizeof(float));
    } else {
      pad_rows(s, l, plane, first * s.stride_y, (rows - 1) * s.stride_y + s.kernel_y, planes);
      write_taps(s, l, planes, rows, s.channels * l.pitch, to);
    }
  }
}

}  // namespace
}  // namespace gossamer
