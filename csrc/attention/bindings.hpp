#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_attention(nanobind::module_& m);
}  // namespace gossamer
