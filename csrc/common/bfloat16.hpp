// bfloat16, held as the upper half of a float32. Compiled once per instruction set.
#pragma once
#include <cstdint>

namespace gossamer {
namespace {

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest even; NaN stays NaN.
inline uint16_t narrow(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace gossamer
