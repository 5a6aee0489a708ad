// Matrix-vector products that touch only the lines whose input is active.
//
// A line is what one activation multiplies, stored contiguously: a column of a weight (out, in)
// kept as W^T, or, in a gated MLP, the gate, up and down weights of one neuron. Only the lines of
// active inputs are read, so the bytes from memory fall with the number of active inputs.
#pragma once
#include <cstdint>

namespace gossamer {

enum LineType { kLineFloat = 0, kLineBf16 = 1, kLineInt8 = 2 };

struct Lines {
  const void* values;        // (count, width)
  const float* line_scale;   // (count), or null
  const float* across_scale; // (width), or null
  int64_t count, width;
  int type;
};

// Sums over active lines are made in so many shares of the active lines, whatever the number of
// threads, so that threads do not change the result.
constexpr int kShares = 8;

// y (width) = sum over i of x[index[i]] * line index[i], plus bias; int8 lines times their scales.
// sums: scratch of kShares * width floats; coefficients: of `active` floats.
using ActiveSum = void (*)(const Lines&, const float* x, const int32_t* index, int64_t active,
                           float* y, const float* bias, float* sums, float* coefficients,
                           int threads);

// y = W_down (silu(W_gate x) * W_up x) over the kept neurons: see run_gated.
struct GatedMlp {
  Lines gate, up, down;
  float threshold;  // keep magnitudes above it, where top < 0
  int64_t top;      // else keep so many
  bool by_gate;     // rank by |silu(gate x)| and compute `up` of the kept neurons only
};

// hidden: scratch of count floats; x_scaled: of 2 * width; the others as in ActiveSum. Returns the
// number of neurons kept.
using ActiveMlp = int64_t (*)(const GatedMlp&, const float* x, float* y, float* hidden,
                              int32_t* index, float* x_scaled, float* sums, float* coefficients,
                              int threads);

void active_sum_portable(const Lines&, const float*, const int32_t*, int64_t, float*, const float*,
                         float*, float*, int);
void active_sum_avx2(const Lines&, const float*, const int32_t*, int64_t, float*, const float*,
                     float*, float*, int);
void active_sum_avx512(const Lines&, const float*, const int32_t*, int64_t, float*, const float*,
                       float*, float*, int);
int64_t active_mlp_portable(const GatedMlp&, const float*, float*, float*, int32_t*, float*, float*,
                            float*, int);
int64_t active_mlp_avx2(const GatedMlp&, const float*, float*, float*, int32_t*, float*, float*,
                        float*, int);
int64_t active_mlp_avx512(const GatedMlp&, const float*, float*, float*, int32_t*, float*, float*,
                          float*, int);

// The indices, ascending, of the n numbers whose magnitude is above the threshold; NaN counts as
// above everything, so that it is seen in the result. index has room for n + 1. Returns how many.
using ActiveAbove = int64_t (*)(const float* x, int64_t n, float threshold, int32_t* index);
int64_t active_above_portable(const float*, int64_t, float, int32_t*);
int64_t active_above_avx2(const float*, int64_t, float, int32_t*);
int64_t active_above_avx512(const float*, int64_t, float, int32_t*);

// Orders as magnitudes do, with NaN above infinity.
inline int32_t magnitude(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7fffffff;
}

// The indices, ascending, of the k largest magnitudes; ties keep the lower index, NaN is largest.
void indices_of_largest(const float* x, int64_t n, int64_t k, int32_t* index);

}  // namespace gossamer
