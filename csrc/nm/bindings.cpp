#include "nm/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"
#include "common/scratch.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// The word of a lane that holds the code of block k, shifted so that the code is lowest.
uint32_t word_of(const Nm& m, const uint8_t* codes, int64_t k, int lane) {
  const int64_t whole = m.blocks() / m.per_word(), word = k / m.per_word();
  const int width = word < whole ? 4 : m.tail_width();
  uint32_t found = 0;
  std::memcpy(&found, codes + word * 64 + lane * width, width);
  return found >> (k % m.per_word() * m.bits());
}

bool is_zero(const Nm& m, int64_t place) {  // of either sign
  if (m.bf16) return (static_cast<const uint16_t*>(m.values)[place] & 0x7fff) == 0;
  return static_cast<const float*>(m.values)[place] == 0.0f;
}

void check_row(const Nm& m, int64_t row, int64_t cols) {
  const int64_t per_span = m.blocks_per_span(), blocks = m.blocks();
  const int slots = m.slots(), bits = m.bits();
  const uint8_t* codes = m.codes + row * m.code_bytes();
  for (int lane = 0; lane < kLaneCount; ++lane) {
    for (int64_t k = 0; k < blocks; ++k) {
      const uint32_t word = word_of(m, codes, k, lane);
      const int code = static_cast<int>(word & (m.group - 1));
      const bool ends = k + 1 == blocks || (k + 1) % m.per_word() == 0;
      if (ends && static_cast<uint64_t>(word) >> bits)
        throw std::invalid_argument("nm: an unused bit of the codes is set");
      int before = -1;  // the place stored before this one in the group
      if (lane % slots) before = word_of(m, codes, k, lane - 1) & (m.group - 1);
      else if (k % per_span) before = word_of(m, codes, k - 1, lane + slots - 1) & (m.group - 1);
      if (code <= before) throw std::invalid_argument("nm: places in a group do not ascend");
      const int64_t column = k / per_span * m.span_columns() + lane / slots * m.group + code;
      if (column >= cols && !is_zero(m, (row * blocks + k) * kLaneCount + lane))
        throw std::invalid_argument("nm: a value lies beyond the last column");
    }
  }
}

}  // namespace

NmMatrix::NmMatrix(const Tensor& codes, const Tensor& values, int64_t cols, int keep, int group)
    : cols_(cols),
      kept_{codes.owner(), values.owner()} {
  if (cols < 0 || group < 2 || group > 32 || group & (group - 1) || keep < 1 || keep >= group)
    throw std::invalid_argument("nm: bad size");
  view_.rows = codes.size(0), view_.keep = keep, view_.group = group;
  view_.spans = (cols + view_.span_columns() - 1) / view_.span_columns();
  view_.codes = codes.data<const uint8_t>("codes", {view_.rows, view_.code_bytes()});
  view_.values = values.floats("values", {view_.rows, view_.blocks() * kLaneCount});
  view_.bf16 = values.is_bf16();
}

void NmMatrix::check() const {
  for (int64_t r = 0; r < view_.rows; ++r) check_row(view_, r, cols_);
}

// Padded here, because small layers are called so often that every tensor operation around the
// kernel would cost more than the kernel.
void NmMatrix::matvec(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias,
                      int threads, int isa) const {
  const int64_t rows = view_.rows, batch = rows ? y.count() / rows : 0, padded = view_.padded();
  if (batch < 1 || batch > 8 || threads < 1) throw std::invalid_argument("nm: bad batch");
  const float* input = x.data<const float>("x", {batch, cols_});
  auto* output = y.data<float>("y", {batch, rows});
  thread_local std::vector<float> wide;
  if (padded != cols_ || reinterpret_cast<uintptr_t>(input) % 64) {
    float* copy = aligned(wide, batch * padded);
    for (int64_t b = 0; b < batch; ++b) {
      if (cols_) std::memcpy(copy + b * padded, input + b * cols_, cols_ * sizeof(float));
      std::memset(copy + b * padded + cols_, 0, (padded - cols_) * sizeof(float));
    }
    input = copy;
  }
  kernels<NmKernels>(isa).matvec(view_, input, batch, output,
                                 bias ? bias->data<const float>("bias", {rows}) : nullptr, threads);
}

void NmMatrix::unpack(int64_t first, const Tensor& out, int threads, int isa) const {
  const int64_t last = first + out.size(0);
  if (first < 0 || last > view_.rows || threads < 1) throw std::invalid_argument("nm: bad rows");
  auto* to = out.data<float>("out", {last - first, cols_});
  if (first == last || cols_ == 0) return;  // nowhere to write
  kernels<NmKernels>(isa).unpack(view_, cols_, first, last, to, threads);
}

void bind_nm(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<NmMatrix>(m, "NmMatrix")
      .def(nb::init<const Tensor&, const Tensor&, int64_t, int, int>())
      .def("check", &NmMatrix::check, Unlocked())
      .def("matvec", &NmMatrix::matvec, Unlocked())
      .def("unpack", &NmMatrix::unpack, Unlocked());
}

}  // namespace gossamer
