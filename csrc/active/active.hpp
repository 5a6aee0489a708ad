// Matrix-vector products that touch only the neurons whose input is active.
//
// A neuron is what one activation multiplies, stored contiguously: a column of a weight (out, in)
// kept as W^T; in a gated MLP a row of gate and up and a column of down. Only active neurons are
// read, so the bytes from memory fall with the number of active inputs.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

enum NeuronType { kNeuronFloat = 0, kNeuronBf16 = 1, kNeuronInt8 = 2 };

struct Neurons {
  const void* values;        // (count, width)
  const float* neuron_scale; // (count), or null
  const float* across_scale; // (width), or null
  int64_t count, width;
  int type;
};

// Sums over active neurons are made in so many shares of the active neurons, whatever the number of
// threads, so that threads do not change the result.
constexpr int kShares = 8;

// y = W_down (silu(W_gate x) * W_up x) over the kept neurons: see run_gated.
struct GatedMlp {
  Neurons gate, up, down;
  float threshold;  // keep magnitudes above it, where top < 0
  int64_t top;      // else keep so many
  bool by_gate;     // rank by |silu(gate x)| and compute `up` of the kept neurons only
};

struct ActiveKernels {
  // y (width) = sum over i of x[index[i]] * neuron index[i], plus bias; int8 neurons times their
  // scales. sums: scratch of kShares * width floats; coefficients: of `active` floats.
  void (*sum)(const Neurons&, const float* x, const int32_t* index, int64_t active, float* y,
              const float* bias, float* sums, float* coefficients, int threads);

  // hidden: scratch of count floats; x_scaled: of 2 * width; the others as above. Returns the
  // number of neurons kept.
  int64_t (*gated_mlp)(const GatedMlp&, const float* x, float* y, float* hidden, int32_t* index,
                       float* x_scaled, float* sums, float* coefficients, int threads);

  // The indices, ascending, of the n numbers whose magnitude is above the threshold; NaN counts as
  // above everything, so that it is seen in the result. index has room for n + 1. Returns how many.
  int64_t (*above)(const float* x, int64_t n, float threshold, int32_t* index);
};

template <>
const ActiveKernels Tables<ActiveKernels>::portable;
template <>
const ActiveKernels Tables<ActiveKernels>::avx2;
template <>
const ActiveKernels Tables<ActiveKernels>::avx512;

// Orders as magnitudes do, with NaN above infinity.
inline int32_t magnitude(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7fffffff;
}

// The indices, ascending, of the k largest magnitudes; ties keep the lower index, NaN is largest.
void indices_of_largest(const float* x, int64_t n, int64_t k, int32_t* index);

}  // namespace gossamer
