// Portable path: walks the kept weights.
#include "quantized/driver.hpp"

namespace gossamer {
namespace {

void word_integers(const Row& row, const uint8_t* from, uint64_t kept, uint8_t* out) {
  for (int j = 0; j < 64; ++j) out[j] = 0;
  for (; kept; kept &= kept - 1) out[__builtin_ctzll(kept)] = *from++ & row.mask;
}

template <bool DENSE, int B>
void row_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  const Row place(m, row);
  const uint8_t* from = place.values;
  for (int b = 0; b < B; ++b) out[b] = 0.0f;
  for (int64_t w = 0; w < m.words; ++w) {
    const int zero = zero_of(m, row, w) << place.lift;
    int32_t sums[B] = {};
    for (uint64_t kept = DENSE ? ~uint64_t{0} : place.bitmap[w]; kept; kept &= kept - 1) {
      const int weight = (*from++ & place.mask) - zero;
      for (int b = 0; b < B; ++b) sums[b] += weight * x[b].values[w * 64 + __builtin_ctzll(kept)];
    }
    const float scale = widen(m.scales[row * m.groups + (w >> m.group_shift)]) /
                        static_cast<float>(1 << place.lift);
    for (int b = 0; b < B; ++b)
      out[b] += static_cast<float>(sums[b]) * (scale * x[b].scales[w / 2]);
  }
}

template <bool DENSE, int ROWS, int B>
void rows_dot(const Quantized& m, int64_t row, const QuantInput* x, float* out) {
  for (int r = 0; r < ROWS; ++r) row_dot<DENSE, B>(m, row + r, x, out + r * B);
}

}  // namespace

template <>
const QuantizedKernels Tables<QuantizedKernels>::portable = {
    run_quantize_input,   run_quantized_matvec,  run_quantized_rows,
    run_quantized_unpack, run_quantized_densify, nullptr};

}  // namespace gossamer
