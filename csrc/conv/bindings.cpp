// Binding of the convolutions. Arrays come by address; Python owns them and has checked dtype,
// contiguity and the form.
#include "conv/bindings.hpp"

#include <nanobind/stl/array.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "conv/conv.hpp"
#include "common/isa.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

void check(const Geometry& s, bool depthwise) {
  const bool sizes = s.images >= 0 && s.channels >= 0 && s.height >= 1 && s.width >= 1;
  const bool kernel = s.kernel_y >= 1 && s.kernel_x >= 1 && s.pad_y >= 0 && s.pad_x >= 0 &&
                      s.stride_y >= 1 && (s.stride_x == 1 || s.stride_x == 2);
  const bool fits = s.kernel_y <= s.height + 2 * s.pad_y && s.kernel_x <= s.width + 2 * s.pad_x;
  const bool deep = !depthwise || (s.kernel_y == 3 && s.kernel_x == 3 && s.pad_y == 1 &&
                                   s.pad_x == 1 && s.stride_y == s.stride_x);
  if (!sizes || !kernel || !fits || !deep) throw std::invalid_argument("conv: bad size");
}

void run(const Conv& c, uintptr_t x, uintptr_t y, int threads, int isa) {
  check_isa(isa);
  check(c.shape, c.depthwise != nullptr);
  if (threads < 1) throw std::invalid_argument("conv: no thread");
  RunConv kernel = conv_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) kernel = conv_avx512;
  if (isa == kAvx2) kernel = conv_avx2;
#endif
  const Layout l = conv_layout(c, threads);
  thread_local std::vector<float> scratch;
  const size_t needed = threads * ((l.floats(c) + 15) / 16 * 16) + 16;
  if (scratch.size() < needed) scratch.resize(needed);
  float* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4 % 16;
  kernel(c, floats(x), reinterpret_cast<float*>(y), aligned, threads);
}

Geometry geometry(const std::array<int64_t, 10>& n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
}

// form: values, columns, counts, rows, out, depth, tiled; ends: weight and bias of a depthwise
// convolution before this one, or 0, then this one's bias; clamps: of both, low and high each.
void conv(const std::array<int64_t, 10>& shape, const std::array<int64_t, 7>& form,
          const std::array<uintptr_t, 3>& ends, const std::array<float, 4>& clamps, uintptr_t x,
          uintptr_t y, int threads, int isa) {
  const Geometry s = geometry(shape);
  const Kept kept{floats(form[0]),
                  reinterpret_cast<const uint16_t*>(form[1]),
                  reinterpret_cast<const int32_t*>(form[2]),
                  reinterpret_cast<const int32_t*>(form[3]),
                  form[4],
                  form[5],
                  form[6] != 0};
  const int64_t depth = ends[0] ? s.channels : s.channels * s.kernel_y * s.kernel_x;
  if (kept.out < 0 || kept.depth != depth || depth > 1 << 16)
    throw std::invalid_argument("conv: the weights do not fit the images");
  run({s, floats(ends[0]), {floats(ends[1]), clamps[0], clamps[1]}, &kept,
       {floats(ends[2]), clamps[2], clamps[3]}},
      x, y, threads, isa);
}

void depthwise(const std::array<int64_t, 10>& shape, uintptr_t weight, uintptr_t bias, float low,
               float high, uintptr_t x, uintptr_t y, int threads, int isa) {
  run({geometry(shape), floats(weight), {floats(bias), low, high}, nullptr, {}}, x, y, threads, isa);
}

}  // namespace

void bind_conv(nb::module_& m) {
  m.def("sparse_conv", &conv, nb::call_guard<nb::gil_scoped_release>());
  m.def("depthwise_conv", &depthwise, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
