// The loops of limits.hpp, compiled once per instruction set.
#pragma once
#include <omp.h>

#include "common/batch_tiles.hpp"
#include "limits/limits.hpp"

namespace gossamer {
namespace {

inline float total(Wide value) {
  float sum = 0.0f;
  for (int lane = 0; lane < 16; ++lane) sum += value[lane];
  return sum;
}

inline float run_read(const float* data, int64_t n, int threads) {
  float result = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    const int64_t i = omp_get_thread_num(), all = omp_get_num_threads(), parts = n / 64;
    Wide sums[4] = {};
    for (int64_t at = parts * i / all * 64; at < parts * (i + 1) / all * 64; at += 64)
      for (int k = 0; k < 4; ++k) sums[k] += load(data + at + 16 * k);
    result += total(sums[0] + sums[1] + sums[2] + sums[3]);
  }
  return result;
}

inline float run_gather(const float* data, const int64_t* starts, int64_t count, int64_t width,
                        int threads) {
  const int64_t ahead = width < 2048 ? 2048 / width : 1;
  float result = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    const int64_t i = omp_get_thread_num(), all = omp_get_num_threads(), to = count * (i + 1) / all;
    Wide sums[4] = {};
    for (int64_t n = count * i / all; n < to; ++n) {
      const float *next = data + starts[n + ahead < to ? n + ahead : n], *now = data + starts[n];
      for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(next + j, 0, 2);
      for (int64_t j = 0; j < width; j += 64)
        for (int k = 0; k < 4; ++k) sums[k] += load(now + j + 16 * k);
    }
    result += total(sums[0] + sums[1] + sums[2] + sums[3]);
  }
  return result;
}

// Two rows at once, from two places of the matrix, as the sparse kernels have them.
inline void run_dense_matvec(const uint16_t* w, const float* x, int64_t rows, int64_t cols,
                             float* y, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t i = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t from = rows * i / all, to = rows * (i + 1) / all, half = (to - from + 1) / 2;
    for (int64_t r = from; r < from + half; ++r) {
      const int64_t other = r + half < to ? r + half : r;
      const uint16_t *a = w + r * cols, *b = w + other * cols;
      Wide sums_a[2] = {}, sums_b[2] = {};
      for (int64_t j = 0; j < cols; j += 64) {
        __builtin_prefetch(a + j + 1024), __builtin_prefetch(a + j + 1056);
        __builtin_prefetch(b + j + 1024), __builtin_prefetch(b + j + 1056);
        for (int k = 0; k < 4; ++k) {
          const Wide input = load(x + j + 16 * k);
          sums_a[k % 2] += load(a + j + 16 * k) * input;
          sums_b[k % 2] += load(b + j + 16 * k) * input;
        }
      }
      y[r] = total(sums_a[0] + sums_a[1]);
      y[other] = total(sums_b[0] + sums_b[1]);
    }
  }
}

inline float run_multiply(int64_t steps, int threads) {
  float result = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    Wide sums[10], factor;
    for (int lane = 0; lane < 16; ++lane) factor[lane] = 0.9999f;
    for (int k = 0; k < 10; ++k) sums[k] = factor * static_cast<float>(k);
    for (int64_t step = 0; step < steps; ++step)
      for (int k = 0; k < 10; ++k) sums[k] = sums[k] * factor + factor;
    for (int k = 0; k < 10; ++k) result += total(sums[k]);
  }
  return result;
}

}  // namespace
}  // namespace gossamer
