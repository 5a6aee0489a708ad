// Sparse 1x1 convolution on channels-first images: y[o, p] = sum over i of W[o, i] x[i, p] + bias.
//
// Vector lanes run over pixels, so unstructured weights cost nothing in lanes (after Fast Sparse
// ConvNets, 2020). A task is a strip of pixels and a group of output channels, whose sums stay in a
// scratch of 32 KiB. Input channels come in blocks whose strip fits the first-level cache; inside a
// group and block the output channels are sorted by how many weights they keep, so that the length
// of the inner loop hardly ever changes and is predicted.
#pragma once
#include <cstdint>

namespace gossamer {

constexpr int64_t kGroupRows = 128, kChannelBlock = 128, kStrip = 64;

struct Pointwise {
  const float* values;      // group after group, block after block, in the order of `rows`
  const uint16_t* columns;  // input channel within the block
  const uint16_t* rows;     // (groups, blocks, kGroupRows): output channel within the group
  const int64_t* row_ptr;   // (groups * blocks * kGroupRows + 1): where its weights begin
  int64_t out, in;
  int64_t groups() const { return (out + kGroupRows - 1) / kGroupRows; }
  int64_t blocks() const { return (in + kChannelBlock - 1) / kChannelBlock; }
};

// x (images, in, pixels) to y (images, out, pixels), then clamped to low..high, NaN passing through.
// scratch: (kGroupRows + in) * kStrip floats per thread, on a 64-byte boundary.
using PointwiseConv = void (*)(const Pointwise&, const float* x, float* y, int64_t images,
                               int64_t pixels, const float* bias, float low, float high,
                               float* scratch, int threads);

void pointwise_portable(const Pointwise&, const float*, float*, int64_t, int64_t, const float*,
                        float, float, float*, int);
void pointwise_avx2(const Pointwise&, const float*, float*, int64_t, int64_t, const float*, float,
                    float, float*, int);
void pointwise_avx512(const Pointwise&, const float*, float*, int64_t, int64_t, const float*, float,
                      float, float*, int);

}  // namespace gossamer
