#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_decoder(nanobind::module_& m);
}  // namespace gossamer
