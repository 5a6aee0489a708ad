#pragma once
#include <nanobind/nanobind.h>

#include <array>

#include "nm/nm.hpp"

namespace gossamer {
// codes, values (addresses), rows, cols, keep, group, bytes of a row of codes, values of a row, bf16
using NmArgs = std::array<int64_t, 9>;

// Checked against the sizes in it; throws std::invalid_argument.
Nm nm_view(const NmArgs&);
NmRows pick_nm_rows(int isa);
void bind_nm(nanobind::module_& m);
}  // namespace gossamer
