// Binding of the product with blocks. Arrays come by address; Python owns them and has checked
// dtype, contiguity and that every index is in range.
#include "blocks/bindings.hpp"

#include <stdexcept>

#include "blocks/blocks.hpp"
#include "common/isa.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

void linear(uintptr_t values, uintptr_t columns, uintptr_t splits, int64_t rows, int64_t cols,
            int64_t height, int64_t width, bool bf16, uintptr_t x, uintptr_t y, int64_t batch,
            uintptr_t bias, uintptr_t xt, uintptr_t yt, int threads, int isa) {
  check_isa(isa);
  const bool power = height == 1 || height == 2 || height == 4 || height == 8 || height == 16;
  if (!power || width < 1 || rows < 0 || cols < 0 || rows % height || cols % width)
    throw std::invalid_argument("blocks: bad shape");
  if (batch < 0 || threads < 1 || xt % 64 || yt % 64)
    throw std::invalid_argument("blocks: bad size or scratch");
  const Blocks m{reinterpret_cast<const void*>(values),
                 reinterpret_cast<const int32_t*>(columns),
                 reinterpret_cast<const int64_t*>(splits),
                 rows,
                 cols,
                 height,
                 width,
                 bf16};
  BlocksLinear run = blocks_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = blocks_avx512;
  if (isa == kAvx2) run = blocks_avx2;
#endif
  run(m, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), batch,
      reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(xt),
      reinterpret_cast<float*>(yt), threads);
}

}  // namespace

void bind_blocks(nb::module_& m) {
  m.def("blocks_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
