// Binding of the sparse 1x1 convolution. Arrays come by address; Python owns them and has checked
// dtype, contiguity and the form.
#include "pointwise_bindings.hpp"

#include <stdexcept>
#include <vector>

#include "depthwise.hpp"
#include "isa.hpp"
#include "pointwise.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

void conv(uintptr_t values, uintptr_t columns, uintptr_t rows, uintptr_t row_ptr, int64_t out,
          int64_t in, uintptr_t x, uintptr_t y, int64_t images, int64_t pixels, uintptr_t bias,
          float low, float high, int threads, int isa) {
  check_isa(isa);
  if (out < 0 || in < 0 || images < 0 || pixels < 0 || threads < 1)
    throw std::invalid_argument("pointwise: bad size");
  const Pointwise m{reinterpret_cast<const float*>(values),
                    reinterpret_cast<const uint16_t*>(columns),
                    reinterpret_cast<const uint16_t*>(rows),
                    reinterpret_cast<const int64_t*>(row_ptr),
                    out,
                    in};
  PointwiseConv run = pointwise_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = pointwise_avx512;
  if (isa == kAvx2) run = pointwise_avx2;
#endif
  thread_local std::vector<float> scratch;
  scratch.resize(threads * (kGroupRows + in) * kStrip + 16);
  float* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4 % 16;
  run(m, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), images, pixels,
      reinterpret_cast<const float*>(bias), low, high, aligned, threads);
}

void depthwise(uintptr_t x, int64_t images, int64_t channels, int64_t height, int64_t width,
               int64_t stride, uintptr_t weight, uintptr_t bias, uintptr_t y, int threads, int isa) {
  check_isa(isa);
  if (images < 0 || channels < 0 || height < 1 || width < 1 || stride < 1 || stride > 2 ||
      threads < 1)
    throw std::invalid_argument("depthwise: bad size");
  const Planes p{images, channels, height, width, stride};
  Depthwise run = depthwise_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = depthwise_avx512;
  if (isa == kAvx2) run = depthwise_avx2;
#endif
  thread_local std::vector<float> scratch;
  scratch.resize(threads * 2 * (height + 2) * p.row());
  run(p, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight),
      reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y), scratch.data(), threads);
}

}  // namespace

void bind_pointwise(nb::module_& m) {
  m.def("pointwise_conv", &conv, nb::call_guard<nb::gil_scoped_release>());
  m.def("depthwise_conv", &depthwise, nb::call_guard<nb::gil_scoped_release>());
  m.attr("POINTWISE_ROWS") = kGroupRows;
  m.attr("POINTWISE_BLOCK") = kChannelBlock;
}

}  // namespace gossamer
