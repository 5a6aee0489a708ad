// Bindings of the products with compressed rows. Python has checked that every index is in range.
#include "csr/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <stdexcept>

#include "common/isa.hpp"
#include "common/tensor.hpp"
#include "csr/csr.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// columns: int32 (nnz,); splits: int64, see Csr.
Csr matrix(const float* values, const Tensor& columns, const Tensor& splits, int64_t cols) {
  Csr m{values, columns.data<const int32_t>("columns", {columns.count()}), nullptr, splits.size(1),
        cols};
  m.splits = splits.data<const int64_t>("splits", {m.blocks() + 1, m.rows});
  return m;
}

// `places` and the scratch `reordered` come together: see Reordered.
void linear(const Tensor& values, const std::optional<Tensor>& places,
            const std::optional<Tensor>& reordered, const Tensor& columns, const Tensor& splits,
            const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias, int64_t cols,
            const Tensor& xt, const Tensor& yt, int threads, int isa) {
  const int64_t count = columns.count();
  const Csr m = matrix(values.data<const float>("values", {count}), columns, splits, cols);
  const int64_t batch = m.rows ? y.count() / m.rows : 0;
  if (threads < 1 || x.count() != batch * cols || !places != !reordered)
    throw std::invalid_argument("csr: x and y differ in batch");
  Reordered other{};
  if (places)
    other = {places->data<const int32_t>("places", {count}),
             reordered->data<float>("reordered", {count})};
  kernels<CsrKernels>(isa).linear(
      m, other, x.rows<const float>("x", cols), y.rows<float>("y", m.rows), batch,
      bias ? bias->data<const float>("bias", {m.rows}) : nullptr,
      xt.scratch("xt", cols * kCsrWidth), yt.scratch("yt", m.rows * kCsrWidth), threads);
}

void sampled(const Tensor& columns, const Tensor& splits, const Tensor& x, const Tensor& dy,
             const Tensor& grad, int64_t batch, int64_t cols, const Tensor& xt, const Tensor& yt,
             int threads, int isa) {
  const Csr m = matrix(nullptr, columns, splits, cols);
  if (threads < 1 || batch < 0 || x.count() != batch * cols || dy.count() != batch * m.rows)
    throw std::invalid_argument("csr: x and dy differ in batch");
  kernels<CsrKernels>(isa).sampled(
      m, x.rows<const float>("x", cols), dy.rows<const float>("dy", m.rows),
      grad.data<float>("grad", {columns.count()}), batch, xt.scratch("xt", cols * kCsrWidth),
      yt.scratch("yt", m.rows * kCsrWidth), threads);
}

}  // namespace

void bind_csr(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("csr_linear", &linear, Unlocked());
  m.def("csr_sampled", &sampled, Unlocked());
  m.attr("CSR_BLOCK") = kCsrBlock;
  m.attr("CSR_WIDTH") = kCsrWidth;
}

}  // namespace gossamer
