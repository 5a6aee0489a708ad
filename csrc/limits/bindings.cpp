#include "limits/bindings.hpp"

#include <stdexcept>

#include "common/isa.hpp"
#include "common/tensor.hpp"
#include "limits/limits.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

float read(const Tensor& data, int threads, int isa) {
  const int64_t n = data.count();
  if (n % 64 || threads < 1) throw std::invalid_argument("limits: bad size");
  return kernels<LimitsKernels>(isa).read(data.data<const float>("data", {n}), n, threads);
}

float gather(const Tensor& data, const Tensor& starts, int64_t width, int threads, int isa) {
  const int64_t n = data.count(), count = starts.count();
  const auto* begin = starts.data<const int64_t>("starts", {count});
  if (width < 64 || width % 64 || threads < 1) throw std::invalid_argument("limits: bad size");
  for (int64_t i = 0; i < count; ++i)
    if (begin[i] < 0 || begin[i] > n - width) throw std::invalid_argument("limits: bad start");
  return kernels<LimitsKernels>(isa).gather(data.data<const float>("data", {n}), begin, count, width,
                                            threads);
}

float multiply(int64_t steps, int threads, int isa) {
  if (steps < 0 || threads < 1) throw std::invalid_argument("limits: bad size");
  return kernels<LimitsKernels>(isa).multiply(steps, threads);
}

void dense_matvec(const Tensor& weight, const Tensor& x, const Tensor& y, int threads, int isa) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (cols % 64 || threads < 1) throw std::invalid_argument("limits: bad size");
  kernels<LimitsKernels>(isa).dense_matvec(weight.bfloats("weight", {rows, cols}),
                                           x.data<const float>("x", {cols}), rows, cols,
                                           y.data<float>("y", {rows}), threads);
}

}  // namespace

void bind_limits(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("read_floats", &read, Unlocked());
  m.def("gather_floats", &gather, Unlocked());
  m.def("multiply", &multiply, Unlocked());
  m.def("dense_matvec", &dense_matvec, Unlocked());
  m.attr("FLOPS_PER_STEP") = kFlopsPerStep;
}

}  // namespace gossamer
