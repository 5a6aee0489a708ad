#pragma once
#include <nanobind/nanobind.h>

#include <array>

#include "quantized/quantized.hpp"

namespace gossamer {
// values, offsets, bitmap (0: dense), scales, zeros, outlier_ptr, outlier_cols, outlier_values
// (addresses), rows, cols, group_shift, bits, bytes of values, outliers,
// run
using QuantizedArgs = std::array<int64_t, 15>;

// Checked against the sizes in it; throws std::invalid_argument.
Quantized quantized_view(const QuantizedArgs&);
QuantizeInput pick_quantize_input(int isa);
QuantizedRows pick_quantized_rows(int isa);
void bind_quantized(nanobind::module_& m);
}  // namespace gossamer
