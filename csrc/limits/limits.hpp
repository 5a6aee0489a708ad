// What the machine can do at most: the two loops that a benchmark divides by, and a dense product
// to beat where torch's is slow.
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

// y (rows,) = W x for dense bfloat16 W (rows, cols), cols a multiple of 64, and float32 x.
void dense_matvec_portable(const uint16_t* w, const float* x, int64_t rows, int64_t cols, float* y,
                           int threads);
void dense_matvec_avx2(const uint16_t*, const float*, int64_t, int64_t, float*, int);
void dense_matvec_avx512(const uint16_t*, const float*, int64_t, int64_t, float*, int);

}  // namespace gossamer
