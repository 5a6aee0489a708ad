#include "quantized/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <stdexcept>
#include <vector>

#include "common/bfloat16.hpp"
#include "common/isa.hpp"
#include "common/scratch.hpp"

namespace nb = nanobind;

namespace gossamer {

const QuantizedKernels& quantized_kernels(int isa) {
  return kernels<QuantizedKernels>(isa == kAvx512 && !has_vnni() ? kAvx2 : isa);
}

QuantizedMatrix::QuantizedMatrix(const Tensor& values, const Tensor& offsets, const Maybe& bitmap,
                                 const Tensor& scales, const Maybe& zeros, const Maybe& outlier_ptr,
                                 const Maybe& outlier_cols, const Maybe& outlier_values,
                                 int64_t cols, int64_t group, int bits, int balanced)
    : kept_{values.owner(), offsets.owner(), scales.owner()} {
  Quantized& m = view_;
  const bool power = group >= 64 && (group & (group - 1)) == 0;
  if (cols < 0 || !power || (bits != 4 && bits != 8))
    throw std::invalid_argument("quantized: bad shape, group or bits");
  m.rows = scales.size(0), m.cols = cols, m.words = (cols + 63) / 64;
  m.bits = bits, m.balanced = balanced,
  m.group_shift = __builtin_ctzll(static_cast<uint64_t>(group)) - 6;
  m.groups = (m.words + (int64_t{1} << m.group_shift) - 1) >> m.group_shift;
  m.scales = scales.bfloats("scales", {m.rows, m.groups});
  m.offsets = offsets.data<const int64_t>("offsets", {byte_rows() + 1});
  m.values = values.data<const uint8_t>("values", {m.offsets[byte_rows()] + kSlack});
  if (m.offsets[0] != 0) throw std::invalid_argument("quantized: offsets do not begin at 0");
  if (bitmap) {
    m.bitmap =
        reinterpret_cast<const Word*>(bitmap->data<const uint8_t>("bitmap", {m.rows, m.words * 8}));
    kept_[3] = bitmap->owner();
  }
  if (balanced && ((balanced != 4 && balanced != 8) || cols % 64 || !bitmap))
    throw std::invalid_argument("quantized: badly balanced");
  if (zeros) {
    m.zeros = zeros->data<const uint8_t>("zeros", {m.rows, m.groups});
    kept_[4] = zeros->owner();
  }
  if (!outlier_ptr) return;
  if (!outlier_cols || !outlier_values)
    throw std::invalid_argument("quantized: outliers come with columns and values");
  m.outlier_ptr = outlier_ptr->data<const int64_t>("outlier offsets", {m.rows + 1});
  const int64_t outliers = m.outlier_ptr[m.rows];
  m.outlier_cols = outlier_cols->data<const int32_t>("outlier columns", {outliers});
  m.outlier_values = outlier_values->data<const float>("outlier values", {outliers});
  if (m.outlier_ptr[0] != 0) throw std::invalid_argument("quantized: outliers do not begin at 0");
  kept_[5] = outlier_ptr->owner(), kept_[6] = outlier_cols->owner();
  kept_[7] = outlier_values->owner();
}

void QuantizedMatrix::matvec(const Tensor& x, const Tensor& y, const Maybe& bias, int threads,
                             int isa) const {
  const Quantized& m = view_;
  const QuantizedKernels& run = quantized_kernels(isa);
  const int64_t batch = m.rows ? y.count() / m.rows : 0;
  if (batch < 1 || batch > 8 || threads < 1 || x.count() != batch * m.cols ||
      x.is_bf16() != y.is_bf16())
    throw std::invalid_argument("quantized: bad batch");
  const void* given = x.float_rows("x", m.cols);
  void* out = y.float_rows("y", m.rows);
  const float* first = bias ? bias->data<const float>("bias", {m.rows}) : nullptr;
  thread_local std::vector<float> wide, scales, totals, sums;
  thread_local std::vector<int8_t> values;
  const int64_t padded = m.words * 64, pairs = pairs_of(m.words);
  auto* input = static_cast<const float*>(given);
  if (x.is_bf16()) {
    float* copy = aligned(wide, batch * m.cols);
    for (int64_t i = 0; i < batch * m.cols; ++i)
      copy[i] = widen(static_cast<const uint16_t*>(given)[i]);
    input = copy;
  }
  int8_t* q = aligned(values, batch * padded);
  float *scale = aligned(scales, batch * pairs), *total = aligned(totals, batch * m.words);
  QuantInput inputs[8];
  for (int64_t b = 0; b < batch; ++b) {
    inputs[b] = {input + b * m.cols, q + b * padded, scale + b * pairs, total + b * m.words};
    run.quantize_input(input + b * m.cols, m.cols, 0, pairs, q + b * padded, scale + b * pairs,
                       total + b * m.words);
  }
  if (!x.is_bf16()) return run.matvec(m, inputs, batch, static_cast<float*>(out), first, threads);
  float* output = aligned(sums, batch * m.rows);
  run.matvec(m, inputs, batch, output, first, threads);
  for (int64_t i = 0; i < batch * m.rows; ++i) static_cast<uint16_t*>(out)[i] = narrow(output[i]);
}

void QuantizedMatrix::matmul(const Tensor& x, const Tensor& y, const Maybe& bias, int threads,
                             int isa) const {
  const auto run = quantized_kernels(isa).matmul;
  if (!run) throw std::invalid_argument("quantized: this processor lacks byte dot products");
  const int64_t batch = x.size(0);
  if (batch < 1 || threads < 1) throw std::invalid_argument("quantized: bad batch");
  run(view_, x.data<const float>("x", {batch, view_.cols}), batch,
      y.data<float>("y", {batch, view_.rows}),
      bias ? bias->data<const float>("bias", {view_.rows}) : nullptr, threads);
}

void QuantizedMatrix::unpack(int64_t first, const Tensor& out, int threads, int isa) const {
  const int64_t last = first + out.size(0);
  if (first < 0 || last > view_.rows || threads < 1)
    throw std::invalid_argument("quantized: bad rows");
  quantized_kernels(isa).unpack(view_, first, last,
                                out.data<float>("out", {last - first, view_.cols}), threads);
}

void QuantizedMatrix::densify(const Tensor& out, int threads, int isa) const {
  const int64_t bytes = byte_rows() * view_.words * 64;
  if (threads < 1) throw std::invalid_argument("quantized: no thread");
  quantized_kernels(isa).densify(view_, out.data<uint8_t>("out", {bytes + kSlack}), threads);
}

void bind_quantized(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  using Maybe = QuantizedMatrix::Maybe;
  nb::class_<QuantizedMatrix>(m, "QuantizedMatrix")
      .def(nb::init<const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Maybe&,
                    const Maybe&, const Maybe&, const Maybe&, int64_t, int64_t, int, int>())
      .def("matvec", &QuantizedMatrix::matvec, Unlocked())
      .def("matmul", &QuantizedMatrix::matmul, Unlocked())
      .def("unpack", &QuantizedMatrix::unpack, Unlocked())
      .def("densify", &QuantizedMatrix::densify, Unlocked());
}

}  // namespace gossamer
