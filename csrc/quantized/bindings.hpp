#pragma once
#include <nanobind/nanobind.h>

#include <array>
#include <optional>

#include "common/tensor.hpp"
#include "quantized/quantized.hpp"

namespace gossamer {

// A quantised matrix (rows, cols) of Python's, checked against itself; its arrays live as long.
class QuantizedMatrix {
 public:
  using Maybe = std::optional<Tensor>;

  // As Quantized has them; bitmap: uint8 (rows, words * 8); group: 64 columns times a power of two.
  QuantizedMatrix(const Tensor& values, const Tensor& offsets, const Maybe& bitmap,
                  const Tensor& scales, const Maybe& zeros, const Maybe& outlier_ptr,
                  const Maybe& outlier_cols, const Maybe& outlier_values, int64_t cols,
                  int64_t group, int bits, int balanced);

  // y (batch, rows) = x (batch, cols) W^T + bias for up to 8 inputs, both float32 or both bfloat16;
  // bias float32.
  void matvec(const Tensor& x, const Tensor& y, const Maybe& bias, int threads, int isa) const;
  // The same for any batch, all float32, where byte dot products are to be had.
  void matmul(const Tensor& x, const Tensor& y, const Maybe& bias, int threads, int isa) const;
  // Rows from `first` on, as many as `out` (.., cols) has.
  void unpack(int64_t first, const Tensor& out, int threads, int isa) const;
  // The integers of the same matrix dense, as `out` begins.
  void densify(const Tensor& out, int threads, int isa) const;

  const Quantized& view() const { return view_; }

 private:
  // Rows of bytes: with 4 bits two rows share them.
  int64_t byte_rows() const { return view_.bits == 4 ? (view_.rows + 1) / 2 : view_.rows; }

  Quantized view_{};
  std::array<nanobind::object, 8> kept_;
};

// The table for AVX-512 wants byte dot products too.
const QuantizedKernels& quantized_kernels(int isa);
void bind_quantized(nanobind::module_& m);

}  // namespace gossamer
