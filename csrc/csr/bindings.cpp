// Bindings of the products with compressed rows. Arrays come by address; Python owns them and has
// checked dtype, contiguity and that every index is in range.
#include "csr/bindings.hpp"

#include <stdexcept>

#include "csr/csr.hpp"
#include "common/isa.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

Csr view(uintptr_t values, uintptr_t columns, uintptr_t splits, int64_t rows, int64_t cols) {
  return {reinterpret_cast<const float*>(values), reinterpret_cast<const int32_t*>(columns),
          reinterpret_cast<const int64_t*>(splits), rows, cols};
}

void check(int64_t rows, int64_t cols, int64_t batch, uintptr_t xt, uintptr_t yt, int threads,
           int isa) {
  check_isa(isa);
  if (rows < 0 || cols < 0 || batch < 0 || threads < 1 || xt % 64 || yt % 64)
    throw std::invalid_argument("csr: bad size or scratch");
}

void linear(uintptr_t values, uintptr_t places, uintptr_t reordered, uintptr_t columns,
            uintptr_t splits, int64_t rows, int64_t cols, uintptr_t x, uintptr_t y, int64_t batch, uintptr_t bias, uintptr_t xt,
            uintptr_t yt, int threads, int isa) {
  check(rows, cols, batch, xt, yt, threads, isa);
  CsrLinear run = csr_linear_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = csr_linear_avx512;
  if (isa == kAvx2) run = csr_linear_avx2;
#endif
  const Reordered other{reinterpret_cast<const int32_t*>(places),
                        reinterpret_cast<float*>(reordered)};
  run(view(values, columns, splits, rows, cols), other, reinterpret_cast<const float*>(x),
      reinterpret_cast<float*>(y), batch, reinterpret_cast<const float*>(bias),
      reinterpret_cast<float*>(xt), reinterpret_cast<float*>(yt), threads);
}

void sampled(uintptr_t columns, uintptr_t splits, int64_t rows, int64_t cols, uintptr_t x,
             uintptr_t dy, uintptr_t grad, int64_t batch, uintptr_t xt, uintptr_t yt, int threads,
             int isa) {
  check(rows, cols, batch, xt, yt, threads, isa);
  CsrSampled run = csr_sampled_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = csr_sampled_avx512;
  if (isa == kAvx2) run = csr_sampled_avx2;
#endif
  run(view(0, columns, splits, rows, cols), reinterpret_cast<const float*>(x),
      reinterpret_cast<const float*>(dy), reinterpret_cast<float*>(grad), batch,
      reinterpret_cast<float*>(xt), reinterpret_cast<float*>(yt), threads);
}

}  // namespace

void bind_csr(nb::module_& m) {
  m.def("csr_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.def("csr_sampled", &sampled, nb::call_guard<nb::gil_scoped_release>());
  m.attr("CSR_BLOCK") = kCsrBlock;
  m.attr("CSR_WIDTH") = 128;
}

}  // namespace gossamer
