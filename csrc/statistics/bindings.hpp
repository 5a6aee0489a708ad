#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_statistics(nanobind::module_& m);
}  // namespace gossamer
