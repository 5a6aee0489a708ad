// Rows of keys and values turned into panels, rows of queries into units, and products with them.
#pragma once
#include <new>

#include "attention/attention.hpp"
#include "attention/math.hpp"
#include "common/bfloat16.hpp"

namespace gossamer {
namespace {

// Memory on a 64-byte boundary for the length of a call.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * (count ? count : 1),
                                                 std::align_val_t{64}))) {}
  ~Floats() { ::operator delete(data_, std::align_val_t{64}); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

template <int N>
struct Constant {
  static constexpr int value = N;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Units of a row of so many numbers.
inline int64_t units(int64_t width) { return (width + kPer - 1) / kPer; }

template <class X>
const X* row_of(const Heads& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const X*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// The unit of numbers j.. of a row, and sixteen of them.
template <class X>
float unit(const X* row, int64_t j, int64_t width) {
  if (kPer == 1) return widen(row[j]);
  uint32_t bits = static_cast<uint32_t>(row[j]);  // of bfloat16 only
  if (j + 1 < width) bits |= static_cast<uint32_t>(row[j + 1]) << 16;
  float found;
  __builtin_memcpy(&found, &bits, 4);
  return found;
}
template <class X>
Wide sixteen(const X* row, int64_t j) {
  if (kPer == 1) return load(row + j);
  Wide found;
  __builtin_memcpy(&found, row + j, sizeof found);
  return found;
}

// A panel (units of width, 16) of `count` rows, zero beyond; so that one query's unit meets 16 keys.
template <class X>
void pack_across(const X* const* rows, int64_t count, int64_t width, float* panel) {
  const int64_t step = 16 * kPer;
  int64_t j = 0;
  for (; j + step <= width; j += step) {
    Wide v[16];
    for (int64_t k = 0; k < 16; ++k) v[k] = k < count ? sixteen(rows[k], j) : Wide{};
    transpose(v);
    for (int64_t k = 0; k < 16; ++k) store(v[k], panel + (j / kPer + k) * kPanel);
  }
  for (; j < width; j += kPer)
    for (int64_t k = 0; k < 16; ++k)
      panel[j / kPer * kPanel + k] = k < count ? unit(rows[k], j, width) : 0.0f;
}

// A panel (16 / kPer, padded) of `count` rows, zero beyond and past the width; so that a weight
// meets 16 numbers of a row. Returns whether a number is infinite or NaN.
template <class X>
bool pack_along(const X* const* rows, int64_t count, int64_t width, int64_t padded, float* panel) {
  Wide odd{};
  for (int64_t k = 0; k < kPanel; k += kPer) {
    float* to = panel + k / kPer * padded;
    for (int64_t j = 0; j < padded; j += 16) {
      Wide part[kPer];
      for (int i = 0; i < kPer; ++i) {
        if (k + i >= count) part[i] = Wide{};
        else if (j + 16 <= width) part[i] = load(rows[k + i] + j);
        else
          for (int64_t c = 0; c < 16; ++c) part[i][c] = j + c < width ? widen(rows[k + i][j + c]) : 0;
        odd += part[i] * 0.0f;
      }
      if (kPer == 2)
        part[0] = reinterpret_cast<Wide>((reinterpret_cast<Words>(part[0]) >> 16) |
                                         reinterpret_cast<Words>(part[kPer - 1]));
      store(part[0], to + j);
    }
  }
  for (int c = 0; c < 16; ++c)
    if (odd[c] != 0) return true;
  return false;
}

template <class X>
void pack_query(const X* row, int64_t width, float* to) {
  int64_t j = 0;
  for (; j + 16 * kPer <= width; j += 16 * kPer) store(sixteen(row, j), to + j / kPer);
  for (; j < width; j += kPer) to[j / kPer] = unit(row, j, width);
}

// As float32, zero past the width.
template <class X>
void pack_plain(const X* row, int64_t width, int64_t padded, float* to) {
  int64_t j = 0;
  for (; j + 16 <= width; j += 16) store(load(row + j), to + j);
  for (; j < padded; ++j) to[j] = j < width ? widen(row[j]) : 0.0f;
}

template <class X>
void write_row(const float* from, float factor, int64_t width, X* to) {
  int64_t j = 0;
  for (; j + 16 <= width; j += 16) store(load(from + j) * factor, to + j);
  for (; j < width; ++j) store(from[j] * factor, to + j);
}

// sums[r][c] += over k of a[r * row + k * step] * the vector at b[c] + k * b_step.
template <int R, int C>
__attribute__((always_inline)) inline void add_products(const float* a, int64_t row, int64_t step,
                                                        const float* const (&b)[C], int64_t b_step,
                                                        int64_t depth, Lanes (&sums)[R][C]) {
  for (int64_t k = 0; k < depth; ++k) {
    Lanes across[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) across[c] = at(b[c] + k * b_step);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes one = filled(a[r * row + k * step]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = multiply_add(one, across[c], sums[r][c]);
    }
  }
}

}  // namespace
}  // namespace gossamer
