// What the machine can do at most: the two loops that a benchmark divides by.
#pragma once
#include <cstdint>

namespace gossamer {

constexpr int64_t kFlopsPerStep = 10 * 16 * 2;  // of one thread

// Reads n floats (a multiple of 64) once; the sum keeps the compiler from leaving it out.
float read_portable(const float*, int64_t n, int threads);
float read_avx2(const float*, int64_t n, int threads);
float read_avx512(const float*, int64_t n, int threads);

// Every thread does `steps` times kFlopsPerStep multiply-adds on registers.
float multiply_portable(int64_t steps, int threads);
float multiply_avx2(int64_t steps, int threads);
float multiply_avx512(int64_t steps, int threads);

}  // namespace gossamer
