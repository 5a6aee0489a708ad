// N:M products, portable path: sixteen lanes are arrays.
#include <cstdint>
#include <cstring>

#include "nm/nm.hpp"

namespace gossamer {
namespace {

struct Floats {
  float lane[16];
};
struct Ints {
  uint32_t lane[16];
};
constexpr int kParts = 1, kReach = 1;

inline Ints load_codes(const uint8_t* from, int width) {
  Ints found;
  uint16_t halves[16];
  if (width == 4) std::memcpy(found.lane, from, sizeof found.lane);
  if (width == 2) std::memcpy(halves, from, sizeof halves);
  if (width == 2)
    for (int k = 0; k < 16; ++k) found.lane[k] = halves[k];
  if (width == 1)
    for (int k = 0; k < 16; ++k) found.lane[k] = from[k];
  return found;
}
inline Ints load_ints(const int32_t* from) {
  Ints found;
  std::memcpy(found.lane, from, sizeof found.lane);
  return found;
}

template <int BITS>
inline Ints next(Ints codes) {
  for (uint32_t& code : codes.lane) code >>= BITS;
  return codes;
}

template <int BITS>
inline Ints columns(Ints codes, Ints base) {
  for (int k = 0; k < 16; ++k) codes.lane[k] = (codes.lane[k] & ((1u << BITS) - 1)) | base.lane[k];
  return codes;
}

inline Floats load16(const float* p) {
  Floats found;
  std::memcpy(found.lane, p, sizeof found.lane);
  return found;
}
inline Floats load16(const uint16_t* p) {
  uint32_t wide[16];
  for (int k = 0; k < 16; ++k) wide[k] = static_cast<uint32_t>(p[k]) << 16;
  Floats found;
  std::memcpy(found.lane, wide, sizeof found.lane);
  return found;
}

template <int>
inline Floats lookup(const float* x, Ints at) {
  Floats found;
  for (int k = 0; k < 16; ++k) found.lane[k] = x[at.lane[k]];
  return found;
}

inline Floats fused(const Floats& a, const Floats& b, Floats sum) {
  for (int k = 0; k < 16; ++k) sum.lane[k] += a.lane[k] * b.lane[k];
  return sum;
}
inline Floats none() { return {}; }
inline float total(const Floats& v) {
  float sum = 0.0f;
  for (const float part : v.lane) sum += part;
  return sum;
}
inline void spill(const Ints& v, int32_t* to) { std::memcpy(to, v.lane, sizeof v.lane); }
inline void spill(const Floats& v, float* to) { std::memcpy(to, v.lane, sizeof v.lane); }

}  // namespace
}  // namespace gossamer

#include "nm/driver.hpp"

namespace gossamer {

template <>
const NmKernels Tables<NmKernels>::portable = {run_nm_matvec, run_nm_rows, run_nm_unpack};

}  // namespace gossamer
