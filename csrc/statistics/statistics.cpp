#include "statistics/statistics.hpp"

#include <omp.h>

#include <cstring>
#include <vector>

namespace gossamer {
namespace {

constexpr int kRows = 4;  // as many lanes as every processor has
typedef float Group __attribute__((vector_size(4 * kRows)));
typedef int32_t Counts __attribute__((vector_size(4 * kRows)));

// kRows short rows at a time, one per lane: a score is kept if fewer than k go before it.
// `numbers` is -1 in lanes that met no NaN.
template <int N>
__attribute__((always_inline)) inline void few_rows(const float* scores, int32_t k, uint8_t* mask,
                                                    Counts& numbers) {
  Group score[N];
  Counts before[N];
  for (int i = 0; i < N; ++i) {
    float column[kRows];
    for (int lane = 0; lane < kRows; ++lane) column[lane] = scores[lane * N + i];
    std::memcpy(&score[i], column, sizeof column);
    numbers &= score[i] == score[i];
    before[i] = Counts{};
  }
  for (int i = 0; i < N; ++i)
    for (int j = i + 1; j < N; ++j) {
      const Counts later = score[j] > score[i];  // -1 where true
      before[i] -= later;
      before[j] += later + 1;
    }
  for (int i = 0; i < N; ++i) {
    int32_t kept[kRows];
    const Counts found = before[i] < k;
    std::memcpy(kept, &found, sizeof kept);
    for (int lane = 0; lane < kRows; ++lane) mask[lane * N + i] = kept[lane] & 1;
  }
}

template <int N>
bool short_rows(const float* scores, int64_t rows, int64_t k, uint8_t* mask) {
  Counts numbers = {};
  numbers = ~numbers;
  int64_t at = 0;
  for (; at + kRows <= rows; at += kRows)
    few_rows<N>(scores + at * N, static_cast<int32_t>(k), mask + at * N, numbers);
  if (at < rows) {
    float last[kRows * N] = {};
    uint8_t kept[kRows * N];
    std::memcpy(last, scores + at * N, (rows - at) * N * sizeof(float));
    few_rows<N>(last, static_cast<int32_t>(k), kept, numbers);
    std::memcpy(mask + at * N, kept, (rows - at) * N);
  }
  for (int lane = 0; lane < kRows; ++lane)
    if (!numbers[lane]) return false;
  return true;
}

// Unsigned integers in the order of the floats; -0 counts as 0.
inline uint32_t ordered(float score) {
  uint32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One row by digits of 8 bits, from the highest: `left` holds those that agree with the k-th
// largest in all digits so far.
bool long_row(const float* scores, int64_t n, int64_t k, uint8_t* mask,
              std::vector<uint32_t>& left) {
  left.resize(n);
  bool numbers = true;
  for (int64_t j = 0; j < n; ++j) {
    numbers &= scores[j] == scores[j];
    left[j] = ordered(scores[j]);
  }
  if (!numbers) return false;
  int64_t room = k, count = n;
  uint32_t limit = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t found[4][256] = {};  // four, so that equal digits in a row do not wait for each other
    for (int64_t j = 0; j < count; ++j) ++found[j % 4][left[j] >> shift & 255];
    uint32_t digit = 255;
    for (;; --digit) {
      const int64_t here = found[0][digit] + found[1][digit] + found[2][digit] + found[3][digit];
      if (room <= here) break;
      room -= here;
    }
    limit |= digit << shift;
    int64_t next = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t key = left[j];
      left[next] = key;
      next += (key >> shift & 255) == digit;
    }
    count = next;
  }
  for (int64_t j = 0; j < n; ++j) {  // `room` of the equal ones, from the left
    const uint32_t key = ordered(scores[j]);
    const bool tied = key == limit;
    mask[j] = (key > limit) | (tied & (room > 0));
    room -= tied;
  }
  return true;
}

bool some_rows(const float* scores, int64_t rows, int64_t n, int64_t k, uint8_t* mask) {
  switch (n) {
    case 2: return short_rows<2>(scores, rows, k, mask);
    case 4: return short_rows<4>(scores, rows, k, mask);
    case 8: return short_rows<8>(scores, rows, k, mask);
    case 16: return short_rows<16>(scores, rows, k, mask);
    case 32: return short_rows<32>(scores, rows, k, mask);
    default: break;
  }
  std::vector<uint32_t> left;
  bool numbers = true;
  for (int64_t r = 0; r < rows && numbers; ++r)
    numbers = long_row(scores + r * n, n, k, mask + r * n, left);
  return numbers;
}

}  // namespace

bool top_mask(const float* scores, int64_t rows, int64_t n, int64_t k, uint8_t* mask, int threads) {
  bool numbers = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : numbers)
  {
    const int64_t i = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t from = rows * i / all, to = rows * (i + 1) / all;
    numbers = some_rows(scores + from * n, to - from, n, k, mask + from * n);
  }
  return numbers;
}

void compensated_add(float* total, float* rest, int64_t stride, const float* product,
                     int64_t product_stride, int64_t rows, int64_t cols, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    float *sums = total + r * stride, *lost = rest + r * stride;
    const float* add = product + r * product_stride;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const float before = sums[j], sum = before + add[j], part = sum - before;
      lost[j] += (before - (sum - part)) + (add[j] - part);
      sums[j] = sum;
    }
  }
}

}  // namespace gossamer
