// N:M matrices: in every `group` consecutive columns of a row `keep` values are stored, zeros where
// fewer count, each with its place in the group as a code of log2(group) bits.
//
// Values come in blocks of 16, one vector of floats. `slots` is the largest power of two that
// divides `keep`, at most 16; a block holds `slots` values of each of 16 / slots groups, so
// keep / slots blocks fill a span of 16 / slots groups, and lane l of every block belongs to group
// l / slots of its span. One vector of 32-bit words holds, lane by lane, the codes of the next
// 32 / bits blocks; a row's last words shrink to 16 or 8 bits where they suffice.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int64_t kLaneCount = 16;

struct Nm {
  const uint8_t* codes;  // (rows, code_bytes)
  const void* values;  // (rows, blocks * 16) float32, or bfloat16 as uint16
  int64_t rows, spans;  // spans of a row
  int keep, group;
  bool bf16;
  int bits() const { return __builtin_ctz(static_cast<unsigned>(group)); }
  int slots() const {
    const int lowest = keep & -keep;
    return lowest < kLaneCount ? lowest : static_cast<int>(kLaneCount);
  }
  int64_t span_columns() const { return kLaneCount / slots() * group; }
  int64_t padded() const { return spans * span_columns(); }  // columns
  int64_t blocks_per_span() const { return keep / slots(); }
  int64_t blocks() const { return spans * blocks_per_span(); }
  int64_t per_word() const { return 32 / bits(); }  // blocks that share a word
  // Bytes per lane of the last words, 0 where all words are whole.
  int tail_width() const {
    const int64_t left = blocks() % per_word() * bits();
    return left == 0 ? 0 : left <= 8 / bits() * bits() ? 1 : left <= 16 / bits() * bits() ? 2 : 4;
  }
  int64_t code_bytes() const { return kLaneCount * (blocks() / per_word() * 4 + tail_width()); }
};

struct NmKernels {
  // y (batch, rows) = x (batch, padded) W^T + bias; x is 0 beyond the matrix's columns. What is
  // stored as zero multiplies too.
  void (*matvec)(const Nm&, const float* x, int64_t batch, float* y, const float* bias,
                 int threads);

  // y[r] = row r of W times x for the rows from..to, bias not added; one thread.
  void (*rows)(const Nm&, const float* x, int64_t from, int64_t to, float* y);

  // Rows from..to as dense float32 rows of `cols` into out.
  void (*unpack)(const Nm&, int64_t cols, int64_t from, int64_t to, float* out, int threads);
};

template <>
const NmKernels Tables<NmKernels>::portable;
template <>
const NmKernels Tables<NmKernels>::avx2;
template <>
const NmKernels Tables<NmKernels>::avx512;

}  // namespace gossamer
