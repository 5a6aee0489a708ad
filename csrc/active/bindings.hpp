#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_active(nanobind::module_& m);
}
