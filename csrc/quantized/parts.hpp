// How a quantised matrix is read and its inputs are rounded, for every kernel of it.
#pragma once
#include <cmath>
#include <cstring>

#include "common/bfloat16.hpp"
#include "quantized/quantized.hpp"

namespace gossamer {
namespace {

// How one row lies in the values: its first byte, and which bits of a byte are its own.
struct Row {
  const uint8_t* values;
  const Word* bitmap;  // null: dense
  uint8_t mask;
  int lift;                // integers are read times 1 << lift

  Row(const Quantized& m, int64_t row)
      : values(m.values + m.offsets[m.bits == 4 ? row / 2 : row]),
        bitmap(m.bitmap ? m.bitmap + row * m.words : nullptr),
        mask(m.bits == 8 ? 0xff
             : row % 2   ? 0xf0
                         : 0x0f),
        lift(m.bits == 4 && row % 2 ? 4 : 0) {}
};

inline int zero_of(const Quantized& m, int64_t row, int64_t w) {
  return m.zeros ? m.zeros[row * m.groups + (w >> m.group_shift)] : 1 << (m.bits - 1);
}

typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t SixteenInts __attribute__((vector_size(64)));
typedef int8_t SixteenBytes __attribute__((vector_size(16)));

// To the nearest integer, even at ties, for |v| < 2^22.
inline Sixteen rounded(Sixteen v) { return (v + 12582912.0f) - 12582912.0f; }

// One block of 128 inputs (8 vectors), of which whole words of 64 are stored.
inline void quantize_block(const Sixteen* block, int words, int8_t* values, float* scale,
                           float* sums) {
  const Sixteen none = {};
  Sixteen tops = none, poisons = none;
  for (int k = 0; k < 8; ++k) {
    const Sixteen size = block[k] < none ? -block[k] : block[k];
    tops = size > tops ? size : tops;
    poisons += block[k] * 0.0f;  // NaN where the block holds NaN or infinity
  }
  float top = 0.0f, poison = 0.0f;
  for (int j = 0; j < 16; ++j) top = tops[j] > top ? tops[j] : top, poison += poisons[j];
  const bool finite = poison == poison;
  const float turn = top > 0.0f && finite ? 127.0f / top : 0.0f;
  *scale = finite ? top / 127.0f : NAN;
  for (int w = 0; w < words; ++w) {
    SixteenInts sum = {};
    for (int k = 4 * w; k < 4 * w + 4; ++k) {
      const Sixteen scaled = finite ? rounded(block[k] * turn) : none;
      const Sixteen low = scaled < -127.0f ? none - 127.0f : scaled;
      const SixteenInts found =
          __builtin_convertvector(low > 127.0f ? none + 127.0f : low, SixteenInts);
      const SixteenBytes bytes = __builtin_convertvector(found, SixteenBytes);
      std::memcpy(values + 16 * k, &bytes, 16);
      sum += found;
    }
    int32_t total = 0;
    for (int j = 0; j < 16; ++j) total += sum[j];
    sums[w] = static_cast<float>(total) * *scale;
  }
}

inline void run_quantize_input(const float* x, int64_t cols, int64_t from_pair, int64_t to_pair,
                               int8_t* values, float* scales, float* sums) {
  for (int64_t b = from_pair; b < to_pair; ++b) {
    const int64_t left = cols - b * 128;
    Sixteen block[8] = {};
    std::memcpy(block, x + b * 128, (left < 128 ? left : 128) * sizeof(float));
    quantize_block(block, left > 64 ? 2 : 1, values + b * 128, scales + b, sums + 2 * b);
  }
}

}  // namespace
}  // namespace gossamer
