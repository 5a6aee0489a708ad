// Bindings of the sparse times sparse product. Arrays come by address; Python owns them and has
// checked dtypes, contiguity and the row offsets of both matrices.
#include "spgemm/bindings.hpp"

#include <stdexcept>

#include "spgemm/spgemm.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Parts = nb::tuple;  // row_ptr, columns, values, rows, cols, wide

Rows rows(const Parts& parts) {
  const Rows m{reinterpret_cast<const int64_t*>(nb::cast<uintptr_t>(parts[0])),
               reinterpret_cast<const int32_t*>(nb::cast<uintptr_t>(parts[1])),
               reinterpret_cast<const void*>(nb::cast<uintptr_t>(parts[2])),
               nb::cast<int64_t>(parts[3]),
               nb::cast<int64_t>(parts[4]),
               nb::cast<bool>(parts[5])};
  if (m.rows < 0 || m.cols < 0 || m.cols > INT32_MAX)
    throw std::invalid_argument("spgemm: bad shape");
  return m;
}

void count(const Parts& left, const Parts& right, uintptr_t counts, int threads) {
  const Rows a = rows(left), b = rows(right);
  if (a.cols != b.rows || threads < 1) throw std::invalid_argument("spgemm: shapes do not fit");
  nb::gil_scoped_release released;
  spgemm_count(a, b, reinterpret_cast<int64_t*>(counts), threads);
}

void fill(const Parts& left, const Parts& right, uintptr_t row_ptr, bool sorted, uintptr_t columns,
          uintptr_t values, int threads) {
  const Rows a = rows(left), b = rows(right);
  if (a.cols != b.rows || a.wide != b.wide || threads < 1)
    throw std::invalid_argument("spgemm: shapes or dtypes do not fit");
  nb::gil_scoped_release released;
  spgemm_fill(a, b, reinterpret_cast<const int64_t*>(row_ptr), sorted,
              reinterpret_cast<int32_t*>(columns), reinterpret_cast<void*>(values), threads);
}

}  // namespace

void bind_spgemm(nb::module_& m) {
  m.def("spgemm_count", &count);
  m.def("spgemm_fill", &fill);
}

}  // namespace gossamer
