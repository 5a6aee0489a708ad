// The instruction sets a kernel may be asked for, which of them this processor has, and their
// tables. For the bindings only: what is inline here must not be compiled for a newer processor.
#pragma once
#include <stdexcept>

#include "common/tables.hpp"

namespace gossamer {

enum Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return kAvx2;
#endif
  return kPortable;
}

// Byte dot products, which some processors with AVX-512 lack.
inline bool has_vnni() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Dot products of bfloat16, which some processors with AVX-512 lack.
inline bool has_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Expansion of 16-bit numbers, which some processors with AVX-512 lack.
inline bool has_vbmi2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

inline void check_isa(int isa) {
  if (isa < 0 || isa > best_isa()) throw std::invalid_argument("this processor lacks that ISA");
}

// The functions of an operation for one instruction set.
template <class Kernels>
const Kernels& kernels(int isa) {
  check_isa(isa);
#if defined(__x86_64__)
  if (isa == kAvx512) return Tables<Kernels>::avx512;
  if (isa == kAvx2) return Tables<Kernels>::avx2;
#endif
  return Tables<Kernels>::portable;
}

}  // namespace gossamer
