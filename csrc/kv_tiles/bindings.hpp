#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_kv_tiles(nanobind::module_& m);
}  // namespace gossamer
