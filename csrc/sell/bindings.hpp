#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_sell(nanobind::module_& m);
}  // namespace gossamer
