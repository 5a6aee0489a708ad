// Bindings of the statistics kernels.
#include "statistics/bindings.hpp"

#include <stdexcept>

#include "common/tensor.hpp"
#include "statistics/statistics.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// scores: float32 (rows, n); mask: boolean of the same shape.
bool mask(const Tensor& scores, int64_t k, const Tensor& out, int threads) {
  const int64_t rows = scores.size(0), n = scores.size(1);
  if (n < 1 || k < 1 || k >= n || threads < 1) throw std::invalid_argument("top_mask: bad size");
  return top_mask(scores.data<const float>("scores", {rows, n}), rows, n, k,
                  reinterpret_cast<uint8_t*>(out.data<bool>("mask", {rows, n})), threads);
}

// All float32 (rows, cols), their rows any distance apart; total's and rest's as far as each other.
void add(const Tensor& total, const Tensor& rest, const Tensor& product, int threads) {
  const int64_t rows = product.size(0), cols = product.size(1);
  int64_t stride, other, product_stride;
  float* sums = total.strided("total", rows, cols, &stride);
  float* rests = rest.strided("rest", rows, cols, &other);
  const float* products = product.strided("product", rows, cols, &product_stride);
  if (threads < 1 || stride != other)
    throw std::invalid_argument("compensated_add: total and rest lie differently");
  compensated_add(sums, rests, stride, products, product_stride, rows, cols, threads);
}

}  // namespace

void bind_statistics(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("top_mask", &mask, Unlocked());
  m.def("compensated_add", &add, Unlocked());
}

}  // namespace gossamer
