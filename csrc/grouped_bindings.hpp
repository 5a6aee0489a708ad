#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_grouped(nanobind::module_& m);
}  // namespace gossamer
