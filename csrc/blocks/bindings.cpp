// Binding of the product with blocks. Python has checked that every index is in range.
#include "blocks/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <stdexcept>

#include "blocks/blocks.hpp"
#include "common/isa.hpp"
#include "common/tensor.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// values: (blocks, width, height), float32 or bfloat16; columns: int32 (blocks,); splits: int64,
// see Blocks; x (batch, cols), y (batch, rows) and bias float32.
void linear(const Tensor& values, const Tensor& columns, const Tensor& splits, const Tensor& x,
            const Tensor& y, const std::optional<Tensor>& bias, int64_t cols, const Tensor& xt,
            const Tensor& yt, int threads, int isa) {
  const int64_t count = values.size(0), width = values.size(1), height = values.size(2);
  const bool power = height == 1 || height == 2 || height == 4 || height == 8 || height == 16;
  if (!power || width < 1 || cols < 0 || cols % width || threads < 1)
    throw std::invalid_argument("blocks: bad shape");
  Blocks m{values.floats("values", {count, width, height}),
           columns.data<const int32_t>("columns", {count}),
           nullptr,
           splits.size(1) * height,
           cols,
           height,
           width,
           values.is_bf16()};
  m.splits = splits.data<const int64_t>("splits", {m.parts() + 1, m.block_rows()});
  const int64_t batch = m.rows ? y.count() / m.rows : 0;
  if (x.count() != batch * cols) throw std::invalid_argument("blocks: x and y differ in batch");
  kernels<BlocksKernels>(isa).linear(
      m, x.rows<const float>("x", cols), y.rows<float>("y", m.rows), batch,
      bias ? bias->data<const float>("bias", {m.rows}) : nullptr,
      xt.scratch("xt", cols * kCsrWidth), yt.scratch("yt", m.rows * kCsrWidth), threads);
}

}  // namespace

void bind_blocks(nb::module_& m) {
  m.def("blocks_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
