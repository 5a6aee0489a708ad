// What the loops of attention are made of, in plain vectors. The including file defines kLanes, and
// kWide where it brings its own kind: AVX-512 has better instructions for some.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/batch_tiles.hpp"
#include "common/lanes.hpp"

namespace gossamer {
namespace {

constexpr float kLowest = -3.0e38f;  // the maximum of no logit: exp2(kLowest - anything) is 0
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// 2^f for |f| <= 1/2, to the last bit or two (Cephes).
template <class Vector>
__attribute__((always_inline)) inline Vector small_power(Vector f) {
  Vector p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}

inline Lanes at(const float* from) {
  Lanes found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}
inline void put(Lanes value, float* to) { __builtin_memcpy(to, &value, sizeof value); }

#ifndef GOSSAMER_ATTENTION_AVX512
inline Lanes filled(float value) { return value - Lanes{}; }

// The larger; the second where either is NaN.
inline Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }

// 2^x, exactly 0 below -127; NaN stays NaN. For x up to 127.
inline Lanes power(Lanes x) {
  x = greater(filled(-127.0f), x);
  const Lanes whole = (x + 12582912.0f) - 12582912.0f;
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return small_power(x - whole) * reinterpret_cast<Lanes>(exponent);
}

// Lanes whose bit is 0 become -inf.
inline Lanes keep(Lanes x, uint32_t bits) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const Ints kept = (lane & static_cast<int32_t>(bits)) != 0;
  return kept ? x : filled(-INFINITY);
}

// Lanes whose bit is 0 become 0.
inline Lanes only(Lanes x, uint32_t bits) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  return (lane & static_cast<int32_t>(bits)) != 0 ? x : Lanes{};
}

inline bool any_above(Lanes a, Lanes b) {
  const Ints found = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= found[i];
  return any;
}

// One bit for each of 16 positions that is at most `limit`.
inline uint32_t up_to(const int32_t* positions, int32_t limit) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t{positions[i] <= limit} << i;
  return bits;
}
#endif

inline float greatest(Lanes x) {
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

inline float sum(Lanes x) {
  float found = 0;
  for (int i = 0; i < kLanes; ++i) found += x[i];
  return found;
}

#ifndef GOSSAMER_ATTENTION_BF16
// A unit is what a vector holds per lane: one float32, or two neighbouring bfloat16.
constexpr int kPer = 1;
inline Lanes multiply_add(Lanes a, Lanes b, Lanes sums) { return a * b + sums; }
inline void store_weights(const Lanes* x, int count, float* to) {
  for (int v = 0; v < count; ++v) put(x[v], to + v * kLanes);
}
// Number k of a row of weights; number k of a column of units, which are one above another.
inline float weight_at(const float* weights, int k) { return weights[k]; }
inline float number_at(const float* unit, int) { return *unit; }
inline Wide paired(Wide first, Wide) { return first; }  // units of two rows
inline void pack_rounded(const float*, int64_t, float*) {}  // a row of units
#endif

inline float power_of(float x) { return power(filled(x))[0]; }

}  // namespace
}  // namespace gossamer
