#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_pointwise(nanobind::module_& m);
}
