#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_csr(nanobind::module_& m);
}  // namespace gossamer
