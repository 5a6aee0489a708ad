// The products of nm.hpp, compiled once per instruction set. The including file defines, in an
// anonymous namespace, Floats and Ints (16 lanes each) and
//   Ints load_codes(const uint8_t* from, int width);  16 words of so many bytes, zero-extended
//   Ints load_ints(const int32_t* from);
//   template <int BITS> Ints next(Ints codes);        the codes of the following block
//   template <int BITS> Ints columns(Ints codes, Ints base);  base | the lowest BITS bits
//   Floats load16(const float*), load16(const uint16_t*);
//   template <int PARTS> Floats lookup(const float* x, Ints at);  lane l's `at` lies in the 32
//       columns from 32 * (l * PARTS / 16) on; PARTS 0: anywhere
//   Floats fused(Floats a, Floats b, Floats sum); Floats none(); float total(Floats);
//   void spill(Ints, int32_t*); void spill(Floats, float*);
// and kParts, the most parts that lookup serves other than 0, for groups of up to kReach columns.
#pragma once
#include <omp.h>

#include <cstring>

#include "nm/nm.hpp"

namespace gossamer {
namespace {

// What all rows share.
struct NmPlan {
  int64_t words, per_word, left, per_span, columns, stride, blocks;
  int tail;
  int32_t base[16];  // of each lane's group in a span

  explicit NmPlan(const Nm& m)
      : words(m.blocks() / m.per_word()),
        per_word(m.per_word()),
        left(m.blocks() % m.per_word()),
        per_span(m.blocks_per_span()),
        columns(m.span_columns()),
        stride(m.code_bytes()),
        blocks(m.blocks()),
        tail(m.tail_width()) {
    for (int lane = 0; lane < 16; ++lane) base[lane] = lane / m.slots() * m.group;
  }
};

// One block of R rows times B inputs.
template <class T, int BITS, int PARTS, int R, int B>
__attribute__((always_inline)) inline void block_step(Ints (&words)[R], const T* (&values)[R],
                                                      const float* x, int64_t x_stride, Ints base,
                                                      Floats (&sums)[R][B]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    const Ints at = columns<BITS>(words[r], base);
    const Floats value = load16(values[r]);
    words[r] = next<BITS>(words[r]);
    values[r] += 16;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      sums[r][b] = fused(value, lookup<PARTS>(x + b * x_stride, at), sums[r][b]);
  }
}

// R rows times B inputs: out[r * B + b]. Several rows at once keep more streams from memory going.
template <class T, int BITS, int PARTS, int R, int B>
void some_dots(const Nm& m, const NmPlan& plan, const int64_t (&rows)[R], const float* x,
               float* out) {
  const T* values[R];
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const T*>(m.values) + rows[r] * plan.blocks * 16;
    codes[r] = m.codes + rows[r] * plan.stride;
  }
  const int64_t x_stride = m.padded(), per_span = plan.per_span, columns = plan.columns;
  const Ints base = load_ints(plan.base);
  Floats even[R][B], odd[R][B];  // two sets of sums, for the latency of adding
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) even[r][b] = odd[r][b] = none();
  int64_t in_span = 0;
  for (int64_t left = plan.blocks, w = 0; left > 0; ++w) {
    Ints words[R];
    const int width = w < plan.words ? 4 : plan.tail;
    for (int r = 0; r < R; ++r) {
      words[r] = load_codes(codes[r] + w * 64, width);
      for (int ahead = 0; ahead < 32 / BITS * 16 * int{sizeof(T)}; ahead += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + 2048 + ahead);
    }
    const int64_t count = left < 32 / BITS ? left : 32 / BITS;
    left -= count;
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      block_step<T, BITS, PARTS>(words, values, x, x_stride, base, even);
      if (++in_span == per_span) x += columns, in_span = 0;
      block_step<T, BITS, PARTS>(words, values, x, x_stride, base, odd);
      if (++in_span == per_span) x += columns, in_span = 0;
    }
    if (k < count) {
      block_step<T, BITS, PARTS>(words, values, x, x_stride, base, even);
      if (++in_span == per_span) x += columns, in_span = 0;
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) out[r * B + b] = total(even[r][b]) + total(odd[r][b]);
}

// done(r, b, row r times input b) for the rows from..to. With one input each row goes with the one
// half a share further on; the sums of a row do not depend on that.
template <class T, int BITS, int PARTS, class F>
void rows_product(const Nm& m, const float* x, int64_t batch, int64_t from, int64_t to, F done) {
  const NmPlan plan(m);
  const int64_t half = batch == 1 ? (to - from) / 2 : 0;
  float out[4];
  for (int64_t r = from; r < from + half; ++r) {
    some_dots<T, BITS, PARTS, 2, 1>(m, plan, {r, r + half}, x, out);
    done(r, 0, out[0]);
    done(r + half, 0, out[1]);
  }
  for (int64_t r = from + 2 * half; r < to; ++r) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) {
      some_dots<T, BITS, PARTS, 1, 4>(m, plan, {r}, x + b * m.padded(), out);
      for (int k = 0; k < 4; ++k) done(r, b + k, out[k]);
    }
    for (; b + 2 <= batch; b += 2) {
      some_dots<T, BITS, PARTS, 1, 2>(m, plan, {r}, x + b * m.padded(), out);
      for (int k = 0; k < 2; ++k) done(r, b + k, out[k]);
    }
    if (b < batch) {
      some_dots<T, BITS, PARTS, 1, 1>(m, plan, {r}, x + b * m.padded(), out);
      done(r, b, out[0]);
    }
  }
}

// Lookups in whole vectors of x where a span is short enough, else one by one.
template <class T, int BITS, class F>
void by_span(const Nm& m, const float* x, int64_t batch, int64_t from, int64_t to, F done) {
  const int64_t parts = m.span_columns() / 32;
  if constexpr (1 << BITS <= kReach) {
    if (parts == 1) return rows_product<T, BITS, 1>(m, x, batch, from, to, done);
    if constexpr (BITS >= 2 && kParts >= 2)
      if (parts == 2) return rows_product<T, BITS, 2>(m, x, batch, from, to, done);
    if constexpr (BITS >= 3 && kParts >= 4)
      if (parts == 4) return rows_product<T, BITS, 4>(m, x, batch, from, to, done);
    if constexpr (BITS >= 4 && kParts >= 8)
      if (parts == 8) return rows_product<T, BITS, 8>(m, x, batch, from, to, done);
  }
  rows_product<T, BITS, 0>(m, x, batch, from, to, done);
}

template <class T, class F>
void by_bits(const Nm& m, const float* x, int64_t batch, int64_t from, int64_t to, F done) {
  switch (m.bits()) {
    case 1: return by_span<T, 1>(m, x, batch, from, to, done);
    case 2: return by_span<T, 2>(m, x, batch, from, to, done);
    case 3: return by_span<T, 3>(m, x, batch, from, to, done);
    case 4: return by_span<T, 4>(m, x, batch, from, to, done);
    default: return by_span<T, 5>(m, x, batch, from, to, done);
  }
}

// The results of rows from..to go to y[b * stride + r], biases added.
struct NmOut {
  float* y;
  int64_t stride;
  const float* bias;
  void operator()(int64_t r, int64_t b, float sum) const {
    y[b * stride + r] = sum + (bias ? bias[r] : 0.0f);
  }
};

inline void nm_share(const Nm& m, const float* x, int64_t batch, int64_t from, int64_t to,
                     const NmOut& out) {
  if (m.bf16) by_bits<uint16_t>(m, x, batch, from, to, out);
  else by_bits<float>(m, x, batch, from, to, out);
}

inline void run_nm_rows(const Nm& m, const float* x, int64_t from, int64_t to, float* y) {
  nm_share(m, x, 1, from, to, {y, m.rows, nullptr});
}

inline void run_nm_matvec(const Nm& m, const float* x, int64_t batch, float* y, const float* bias,
                          int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    nm_share(m, x, batch, m.rows * i / n, m.rows * (i + 1) / n, {y, m.rows, bias});
  }
}

template <class T>
void nm_unpack_row(const Nm& m, const NmPlan& plan, int64_t cols, int64_t row, float* out) {
  const T* values = static_cast<const T*>(m.values) + row * plan.blocks * 16;
  const uint8_t* codes = m.codes + row * plan.stride;
  const int bits = m.bits();
  std::memset(out, 0, cols * sizeof(float));
  for (int64_t k = 0; k < plan.blocks; ++k, values += 16) {
    const int64_t word = k / plan.per_word, first = k / plan.per_span * plan.columns;
    int32_t at[16];
    float value[16];
    spill(load_codes(codes + word * 64, word < plan.words ? 4 : plan.tail), at);
    spill(load16(values), value);
    const int shift = static_cast<int>(k % plan.per_word) * bits;
    for (int lane = 0; lane < 16; ++lane) {
      const auto code = static_cast<uint32_t>(at[lane]) >> shift & (m.group - 1);
      const int64_t column = first + plan.base[lane] + code;
      if (column < cols) out[column] = value[lane];
    }
  }
}

inline void run_nm_unpack(const Nm& m, int64_t cols, int64_t from, int64_t to, float* out,
                          int threads) {
  const NmPlan plan(m);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = from; r < to; ++r) {
    if (m.bf16) nm_unpack_row<uint16_t>(m, plan, cols, r, out + (r - from) * cols);
    else nm_unpack_row<float>(m, plan, cols, r, out + (r - from) * cols);
  }
}

}  // namespace
}  // namespace gossamer
