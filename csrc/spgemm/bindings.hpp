#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_spgemm(nanobind::module_& m);
}
