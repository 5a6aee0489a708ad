// What the machine can do at most: the two loops that a benchmark divides by, and a dense product
// to beat where torch's is slow.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int64_t kFlopsPerStep = 10 * 16 * 2;  // of one thread

struct LimitsKernels {
  // Reads n floats (a multiple of 64) once; the sum keeps the compiler from leaving it out.
  float (*read)(const float*, int64_t n, int threads);

  // Reads `count` stretches of `width` floats (a multiple of 64) in the order of their starts, each
  // fetched some 8 KB ahead: what scattered reading can reach.
  float (*gather)(const float*, const int64_t* starts, int64_t count, int64_t width, int threads);

  // Every thread does `steps` times kFlopsPerStep multiply-adds on registers.
  float (*multiply)(int64_t steps, int threads);

  // y (rows,) = W x for dense bfloat16 W (rows, cols), cols a multiple of 64, and float32 x.
  void (*dense_matvec)(const uint16_t* w, const float* x, int64_t rows, int64_t cols, float* y,
                       int threads);
};

template <>
const LimitsKernels Tables<LimitsKernels>::portable;
template <>
const LimitsKernels Tables<LimitsKernels>::avx2;
template <>
const LimitsKernels Tables<LimitsKernels>::avx512;

}  // namespace gossamer
