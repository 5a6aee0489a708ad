#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_blocks(nanobind::module_& m);
}  // namespace gossamer
