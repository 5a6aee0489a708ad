#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {
void bind_conv(nanobind::module_& m);
}
