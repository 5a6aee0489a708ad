#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_limits(nanobind::module_& m);
}  // namespace gossamer
