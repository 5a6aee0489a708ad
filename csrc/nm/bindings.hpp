#pragma once
#include <nanobind/nanobind.h>

#include <array>
#include <optional>

#include "common/tensor.hpp"
#include "nm/nm.hpp"

namespace gossamer {

// An N:M matrix (rows, cols) of Python's, checked against itself; its arrays live as long. Codes
// cannot point outside a padded input, so no content can make a kernel stray.
class NmMatrix {
 public:
  // codes: uint8 (rows, code_bytes); values: float32 or bfloat16 (rows, blocks * 16).
  NmMatrix(const Tensor& codes, const Tensor& values, int64_t cols, int keep, int group);

  // Throws where places in a group do not ascend, an unused bit is set, or padding is not zero.
  void check() const;
  // y (batch, rows) = x (batch, cols) W^T + bias for up to 8 inputs; float32.
  void matvec(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias, int threads,
              int isa) const;
  // Rows from `first` on, as many as `out` (.., cols) has.
  void unpack(int64_t first, const Tensor& out, int threads, int isa) const;

  const Nm& view() const { return view_; }
  int64_t cols() const { return cols_; }

 private:
  Nm view_{};
  int64_t cols_;
  std::array<nanobind::object, 2> kept_;
};

void bind_nm(nanobind::module_& m);

}  // namespace gossamer
