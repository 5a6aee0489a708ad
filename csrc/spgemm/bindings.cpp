// Bindings of the sparse times sparse product. Python has checked the row offsets of both matrices.
#include "spgemm/bindings.hpp"

#include <array>
#include <stdexcept>

#include "common/tensor.hpp"
#include "spgemm/spgemm.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// row_ptr: int64 (rows + 1); columns: int32 (nnz,); values: float32 or float64 (nnz,).
class SparseRows {
 public:
  SparseRows(const Tensor& row_ptr, const Tensor& columns, const Tensor& values, int64_t cols)
      : owners_{row_ptr.owner(), columns.owner(), values.owner()} {
    if (row_ptr.count() < 1 || cols < 0 || cols > INT32_MAX)
      throw std::invalid_argument("spgemm: bad shape");
    view.rows = row_ptr.count() - 1, view.cols = cols;
    view.row_ptr = row_ptr.data<const int64_t>("row offsets", {view.rows + 1});
    const int64_t count = view.row_ptr[view.rows];
    view.columns = columns.data<const int32_t>("columns", {count});
    view.wide = values.type() == Type::float64;
    if (view.wide) view.values = values.data<const double>("values", {count});
    else view.values = values.data<const float>("values", {count});
  }

  Rows view{};

 private:
  std::array<nb::object, 3> owners_;
};

void count(const SparseRows& left, const SparseRows& right, const Tensor& counts, int threads) {
  const Rows &a = left.view, &b = right.view;
  if (a.cols != b.rows || threads < 1) throw std::invalid_argument("spgemm: shapes do not fit");
  spgemm_count(a, b, counts.data<int64_t>("counts", {a.rows}), threads);
}

void multiply(const SparseRows& left, const SparseRows& right, const Tensor& row_ptr, bool sorted,
              const Tensor& columns, const Tensor& values, int threads) {
  const Rows &a = left.view, &b = right.view;
  if (a.cols != b.rows || a.wide != b.wide || threads < 1)
    throw std::invalid_argument("spgemm: shapes or dtypes do not fit");
  const auto* offsets = row_ptr.data<const int64_t>("row offsets", {a.rows + 1});
  const int64_t all = offsets[a.rows];
  void* out = a.wide ? static_cast<void*>(values.data<double>("values", {all}))
                     : values.data<float>("values", {all});
  spgemm_multiply(a, b, offsets, sorted, columns.data<int32_t>("columns", {all}), out, threads);
}

}  // namespace

void bind_spgemm(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<SparseRows>(m, "SparseRows")
      .def(nb::init<const Tensor&, const Tensor&, const Tensor&, int64_t>());
  m.def("spgemm_count", &count, Unlocked());
  m.def("spgemm_multiply", &multiply, Unlocked());
}

}  // namespace gossamer
