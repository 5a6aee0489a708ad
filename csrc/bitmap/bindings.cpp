#include "bitmap/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/bfloat16.hpp"
#include "common/isa.hpp"
#include "common/scratch.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

int64_t stride_of(int64_t cols) { return (cols + 63) / 64 * 8; }

// Offsets of each row's values, from the bitmap; throws where padding bits are set.
void offsets(const Tensor& bitmap, int64_t cols, const Tensor& out) {
  const int64_t rows = bitmap.size(0), stride = stride_of(cols);
  const auto* bits = bitmap.data<const uint8_t>("bitmap", {rows, stride});
  auto* row_ptr = out.data<int64_t>("offsets", {rows + 1});
  row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const Word* words = reinterpret_cast<const Word*>(bits + r * stride);
    int64_t count = 0;
    for (int64_t w = 0; w < stride / 8; ++w) {
      const int64_t left = cols - w * 64;
      const uint64_t allowed = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      if (words[w] & ~allowed) throw std::invalid_argument("bitmap: a padding bit is set");
      count += __builtin_popcountll(words[w]);
    }
    row_ptr[r + 1] = row_ptr[r] + count;
  }
}

// The column of every value, from the bitmap of at most 65536 columns.
void columns(const Tensor& bitmap, const Tensor& row_ptr, const Tensor& out) {
  const int64_t rows = bitmap.size(0), stride = bitmap.size(1);
  if (stride > 65536 / 8) throw std::invalid_argument("bitmap: too many columns for 16 bits");
  const auto* bits = bitmap.data<const uint8_t>("bitmap", {rows, stride});
  const auto* offset = row_ptr.data<const int64_t>("row offsets", {rows + 1});
  auto* column = out.data<uint16_t>("columns", {offset[rows]});
  for (int64_t r = 0; r < rows; ++r) {
    const Word* words = reinterpret_cast<const Word*>(bits + r * stride);
    int64_t count = 0;
    for (int64_t w = 0; w < stride / 8; ++w) count += __builtin_popcountll(words[w]);
    if (offset[r] + count != offset[r + 1])
      throw std::invalid_argument("bitmap: row offsets are of another bitmap");
    for (int64_t w = 0; w < stride / 8; ++w)
      for (uint64_t left = words[w]; left; left &= left - 1)
        *column++ = static_cast<uint16_t>(w * 64 + __builtin_ctzll(left));
  }
}

// x (batch, cols) as float32, padded with zeros to `padded`, on a 64-byte boundary.
template <class X>
const float* padded_input(const X* x, int64_t batch, int64_t cols, int64_t padded,
                          std::vector<float>& memory) {
  float* wide = aligned(memory, batch * padded);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < cols; ++j) wide[b * padded + j] = widen(x[b * cols + j]);
    std::memset(wide + b * padded + cols, 0, (padded - cols) * sizeof(float));
  }
  return wide;
}

}  // namespace

BitmapMatrix::BitmapMatrix(const Tensor& bits, const Tensor& values, const Tensor& row_ptr,
                           const std::optional<Tensor>& columns, int64_t cols)
    : cols_(cols),
      kept_{bits.owner(), values.owner(), row_ptr.owner()} {
  const int64_t rows = bits.size(0), count = values.count();
  view_.stride = stride_of(cols);
  view_.bits = bits.data<const uint8_t>("bitmap", {rows, view_.stride});
  view_.values = values.floats("values", {count});
  view_.row_ptr = row_ptr.data<const int64_t>("row offsets", {rows + 1});
  view_.rows = rows, view_.nnz = count, view_.bf16 = values.is_bf16();
  if (view_.row_ptr[0] != 0 || view_.row_ptr[rows] != count)
    throw std::invalid_argument("bitmap: row offsets do not end at the number of values");
  if (columns) {
    view_.columns = columns->data<const uint16_t>("columns", {count});
    kept_[3] = columns->owner();
  }
}

// Converts and pads here, because small layers are called so often that every tensor operation
// around the kernel would cost more than the kernel.
void BitmapMatrix::matvec(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias,
                          int threads, int isa) const {
  const auto& run = kernels<BitmapKernels>(isa);
  const int64_t rows = view_.rows, batch = rows ? y.count() / rows : 0, padded = view_.stride * 8;
  if (batch < 1 || batch > 8 || threads < 1 || x.count() != batch * cols_ ||
      x.is_bf16() != y.is_bf16())
    throw std::invalid_argument("bitmap: bad batch");
  const void* given = x.float_rows("x", cols_);
  void* out = y.float_rows("y", rows);
  const float* first = bias ? bias->data<const float>("bias", {rows}) : nullptr;
  thread_local std::vector<float> wide, sums;
  const auto* input = static_cast<const float*>(given);
  if (x.is_bf16())
    input = padded_input(static_cast<const uint16_t*>(given), batch, cols_, padded, wide);
  else if (padded != cols_ || reinterpret_cast<uintptr_t>(given) % 64)
    input = padded_input(input, batch, cols_, padded, wide);
  if (!x.is_bf16())
    return run.matvec(view_, input, batch, static_cast<float*>(out), first, threads);
  float* output = aligned(sums, batch * rows);
  run.matvec(view_, input, batch, output, first, threads);
  for (int64_t i = 0; i < batch * rows; ++i) static_cast<uint16_t*>(out)[i] = narrow(output[i]);
}

void BitmapMatrix::spmm(const Tensor& xt, const Tensor& yt, const std::optional<Tensor>& bias,
                        const Tensor& cursor, int threads, int isa) const {
  const int64_t tiles = xt.size(0), width = xt.size(2);
  if (width % 16 || width < 16 || width > 64 || threads < 1)
    throw std::invalid_argument("bitmap: bad tiles");
  kernels<BitmapKernels>(isa).spmm(view_,
                                   xt.data<const float>("x", {tiles, view_.stride * 8, width}),
                                   tiles, width, yt.data<float>("y", {tiles, view_.rows, width}),
                                   bias ? bias->data<const float>("bias", {view_.rows}) : nullptr,
                                   cursor.data<int64_t>("cursor", {view_.rows}), threads);
}

void BitmapMatrix::unpack(int64_t first, const Tensor& out, int threads, int isa) const {
  const int64_t last = first + out.size(0);
  if (first < 0 || last > view_.rows || threads < 1)
    throw std::invalid_argument("bitmap: bad rows");
  kernels<BitmapKernels>(isa).unpack(view_, cols_, first, last,
                                     out.data<float>("out", {last - first, cols_}), threads);
}

void bind_bitmap(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("bitmap_offsets", &offsets, Unlocked());
  m.def("bitmap_columns", &columns, Unlocked());
  nb::class_<BitmapMatrix>(m, "BitmapMatrix")
      .def(nb::init<const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                    int64_t>())
      .def("matvec", &BitmapMatrix::matvec, Unlocked())
      .def("spmm", &BitmapMatrix::spmm, Unlocked())
      .def("unpack", &BitmapMatrix::unpack, Unlocked());
}

}  // namespace gossamer
