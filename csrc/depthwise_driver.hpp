// Depthwise convolution, compiled once per instruction set.
#pragma once
#include <omp.h>

#include "batch_tiles.hpp"
#include "depthwise.hpp"

namespace gossamer {
namespace {

// One plane with a border of zeros; with stride 2 its even columns go to `even`, the others to
// `odd`, so that the inputs of neighbouring outputs are neighbours.
inline void pad_plane(const Planes& p, const float* x, float* even, float* odd) {
  const int64_t row = p.row();
  for (int64_t i = 0; i < (p.height + 2) * row; ++i) even[i] = 0.0f;
  if (p.stride == 2)
    for (int64_t i = 0; i < (p.height + 2) * row; ++i) odd[i] = 0.0f;
  for (int64_t r = 0; r < p.height; ++r) {
    float *first = even + (r + 1) * row, *second = odd + (r + 1) * row;
    const float* from = x + r * p.width;
    if (p.stride == 1) {
      __builtin_memcpy(first + 1, from, p.width * sizeof(float));
      continue;
    }
    // Two loops: under UBSan GCC 12 gets the index wrong behind a conditional pointer.
    for (int64_t j = 0; j < p.width; j += 2) second[j / 2] = from[j];
    for (int64_t j = 1; j < p.width; j += 2) first[(j + 1) / 2] = from[j];
  }
}

inline void plane_product(const Planes& p, const float* even, const float* odd, const float* weight,
                          float bias, float* y) {
  const int64_t row = p.row(), out = p.out_width();
  Wide taps[9];
  for (int t = 0; t < 9; ++t) taps[t] = spread(weight + t);
  for (int64_t r = 0; r < p.out_height(); ++r)
    for (int64_t j = 0; j < out; j += 16) {
      Wide sum = Wide{} + bias;
      for (int t = 0; t < 3; ++t) {
        const int64_t at = (r * p.stride + t) * row + j;
        sum += taps[3 * t] * load(even + at);
        sum += taps[3 * t + 1] * load(p.stride == 2 ? odd + at : even + at + 1);
        sum += taps[3 * t + 2] * load(p.stride == 2 ? even + at + 1 : even + at + 2);
      }
      float* to = y + r * out + j;
      if (out - j >= 16) store(sum, to);
      else __builtin_memcpy(to, &sum, (out - j) * sizeof(float));
    }
}

inline void run_depthwise(const Planes& p, const float* x, const float* weight, const float* bias,
                          float* y, float* scratch, int threads) {
  const int64_t plane = (p.height + 2) * p.row();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < p.images * p.channels; ++i) {
    float* even = scratch + omp_get_thread_num() * 2 * plane;
    const int64_t channel = i % p.channels;
    pad_plane(p, x + i * p.height * p.width, even, even + plane);
    plane_product(p, even, even + plane, weight + 9 * channel, bias ? bias[channel] : 0.0f,
                  y + i * p.out_height() * p.out_width());
  }
}

}  // namespace
}  // namespace gossamer
