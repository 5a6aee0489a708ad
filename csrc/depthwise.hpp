// Dense 3x3 depthwise convolution on channels-first images, padding 1, stride 1 or 2: what stands
// between the sparse 1x1 convolutions of small networks, and slow elsewhere in this layout.
#pragma once
#include <cstdint>

namespace gossamer {

struct Planes {
  int64_t images, channels, height, width, stride;
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  // Floats between rows of a padded plane: whole vectors may be read from any column.
  int64_t row() const { return (width + 2 + 47) / 16 * 16; }
};

// weight (channels, 9); scratch: 2 * (height + 2) * row() floats per thread.
using Depthwise = void (*)(const Planes&, const float* x, const float* weight, const float* bias,
                           float* y, float* scratch, int threads);

void depthwise_portable(const Planes&, const float*, const float*, const float*, float*, float*, int);
void depthwise_avx2(const Planes&, const float*, const float*, const float*, float*, float*, int);
void depthwise_avx512(const Planes&, const float*, const float*, const float*, float*, float*, int);

}  // namespace gossamer
