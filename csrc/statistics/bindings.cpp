// Bindings of the statistics kernels. Arrays come by address; Python owns them and has checked
// dtype, shape and contiguity.
#include "statistics/bindings.hpp"

#include <stdexcept>

#include "statistics/statistics.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

bool mask(uintptr_t scores, int64_t rows, int64_t n, int64_t k, uintptr_t out, int threads) {
  if (rows < 0 || n < 1 || k < 1 || k >= n || threads < 1)
    throw std::invalid_argument("top_mask: bad size");
  return top_mask(reinterpret_cast<const float*>(scores), rows, n, k,
                  reinterpret_cast<uint8_t*>(out), threads);
}

void add(uintptr_t total, uintptr_t rest, int64_t stride, uintptr_t product,
         int64_t product_stride, int64_t rows, int64_t cols, int threads) {
  if (rows < 0 || cols < 0 || cols > stride || cols > product_stride || threads < 1)
    throw std::invalid_argument("compensated_add: bad size");
  compensated_add(reinterpret_cast<float*>(total), reinterpret_cast<float*>(rest), stride,
                  reinterpret_cast<const float*>(product), product_stride, rows, cols, threads);
}

}  // namespace

void bind_statistics(nb::module_& m) {
  m.def("top_mask", &mask, nb::call_guard<nb::gil_scoped_release>());
  m.def("compensated_add", &add, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
