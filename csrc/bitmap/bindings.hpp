#pragma once
#include <nanobind/nanobind.h>

#include <array>
#include <optional>

#include "bitmap/bitmap.hpp"
#include "common/tensor.hpp"

namespace gossamer {

// A bitmap matrix (rows, cols) of Python's, checked against itself; its arrays live as long.
class BitmapMatrix {
 public:
  // bits: uint8 (rows, stride), stride in whole words of 64 columns; values: float32 or bfloat16;
  // row_ptr: int64 (rows + 1); columns: uint16, of every value, or none.
  BitmapMatrix(const Tensor& bits, const Tensor& values, const Tensor& row_ptr,
               const std::optional<Tensor>& columns, int64_t cols);

  // y = x W^T + bias for up to 8 inputs, both float32 or both bfloat16; bias float32.
  void matvec(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias, int threads,
              int isa) const;
  // yt (tiles, rows, width) = W xt (tiles, stride * 8, width) + bias; cursor: int64 (rows,).
  void spmm(const Tensor& xt, const Tensor& yt, const std::optional<Tensor>& bias,
            const Tensor& cursor, int threads, int isa) const;
  // Rows from `first` on, as many as `out` (.., cols) has.
  void unpack(int64_t first, const Tensor& out, int threads, int isa) const;

  const Bitmap& view() const { return view_; }
  int64_t cols() const { return cols_; }

 private:
  Bitmap view_{};
  int64_t cols_;
  std::array<nanobind::object, 4> kept_;
};

void bind_bitmap(nanobind::module_& m);

}  // namespace gossamer
