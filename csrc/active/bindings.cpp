// Choosing the active inputs, and the bindings of the products over them. Python has checked every
// index.
#include "active/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <vector>

#include "active/active.hpp"
#include "common/isa.hpp"
#include "common/tensor.hpp"

namespace nb = nanobind;

namespace gossamer {

void indices_of_largest(const float* x, int64_t n, int64_t k, int32_t* index) {
  if (k <= 0) return;
  thread_local std::vector<int32_t> order;
  order.resize(n);
  for (int64_t j = 0; j < n; ++j) order[j] = magnitude(x[j]);
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<int32_t>());
  const int32_t limit = order[k - 1];
  int64_t ties = k;
  for (int64_t j = 0; j < k; ++j) ties -= order[j] > limit;
  for (int64_t j = 0; k; ++j) {
    const int32_t size = magnitude(x[j]);
    if (size < limit || (size == limit && ties-- <= 0)) continue;
    *index++ = static_cast<int32_t>(j);
    --k;
  }
}

namespace {

// values: (count, width) float32, bfloat16 or int8; scale: float32 (count, 1) or (1, width).
Neurons neurons(const Tensor& values, const std::optional<Tensor>& scale) {
  Neurons m{};
  m.count = values.size(0), m.width = values.size(1);
  if (m.count > INT32_MAX) throw std::invalid_argument("active: too many neurons");
  const bool int8 = values.type() == Type::int8;
  m.type = int8 ? kNeuronInt8 : values.is_bf16() ? kNeuronBf16 : kNeuronFloat;
  if (int8) m.values = values.data<const int8_t>("values", {m.count, m.width});
  else m.values = values.floats("values", {m.count, m.width});
  if (!scale) return m;
  if (scale->size(1) == 1) m.neuron_scale = scale->data<const float>("scale", {m.count, 1});
  else m.across_scale = scale->data<const float>("scale", {1, m.width});
  return m;
}

int64_t above(const Tensor& x, float threshold, const Tensor& index, int isa) {
  const int64_t n = x.count();
  return kernels<ActiveKernels>(isa).above(x.data<const float>("x", {n}), n, threshold,
                                           index.data<int32_t>("index", {n + 1}));
}

void largest(const Tensor& x, const Tensor& index) {
  const int64_t n = x.count(), k = index.count();
  if (k > n) throw std::invalid_argument("active: bad count");
  indices_of_largest(x.data<const float>("x", {n}), n, k, index.data<int32_t>("index", {k}));
}

// Kept from call to call: fresh memory would cost a page fault per 4 KiB, which shows at 1 ms a
// call.
struct Scratch {
  float *sums, *coefficients, *hidden, *scaled;
  int32_t* index;
  Scratch(int64_t n_sums, int64_t n_coefficients, int64_t n_hidden, int64_t n_scaled,
          int64_t n_index) {
    thread_local std::vector<float> floats;
    thread_local std::vector<int32_t> ints;
    const auto wanted = static_cast<size_t>(n_sums + n_coefficients + n_hidden + n_scaled);
    if (floats.size() < wanted) floats.resize(wanted);
    if (ints.size() < static_cast<size_t>(n_index)) ints.resize(n_index);
    sums = floats.data();
    coefficients = sums + n_sums;
    hidden = coefficients + n_coefficients;
    scaled = hidden + n_hidden;
    index = ints.data();
  }
};

// index: int32, the same neurons for every row of x (..., count); none: those of x above the
// threshold, row by row. y (..., width); bias (width,).
void sum(const Tensor& values, const std::optional<Tensor>& scale, const Tensor& x,
         const std::optional<Tensor>& index, float threshold, const Tensor& y,
         const std::optional<Tensor>& bias, int threads, int isa) {
  const auto& run = kernels<ActiveKernels>(isa);
  const Neurons m = neurons(values, scale);
  const int64_t rows = m.width ? y.count() / m.width : 0;
  if (threads < 1 || x.count() != rows * m.count)
    throw std::invalid_argument("active: x and y do not fit each other");
  const float* inputs = x.rows<const float>("x", m.count);
  float* outputs = y.rows<float>("y", m.width);
  const float* first = bias ? bias->data<const float>("bias", {m.width}) : nullptr;
  int64_t active = index ? index->count() : 0;
  const int32_t* given = index ? index->data<const int32_t>("index", {active}) : nullptr;
  const Scratch scratch(kShares * m.width, std::max(active, m.count), 0, 0, m.count + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const float* input = inputs + row * m.count;
    if (!index) active = run.above(input, m.count, threshold, scratch.index);
    run.sum(m, input, index ? given : scratch.index, active, outputs + row * m.width, first,
            scratch.sums, scratch.coefficients, threads);
  }
}

// Neurons of gate and up are (count, in), those of down (count, out); see GatedMlp.
int64_t gated_mlp(const Tensor& gate, const std::optional<Tensor>& gate_scale, const Tensor& up,
                  const std::optional<Tensor>& up_scale, const Tensor& down,
                  const std::optional<Tensor>& down_scale, float threshold, int64_t top,
                  bool by_gate, const Tensor& x, const Tensor& y, int threads, int isa) {
  const auto& run = kernels<ActiveKernels>(isa);
  const GatedMlp m{neurons(gate, gate_scale),
                   neurons(up, up_scale),
                   neurons(down, down_scale),
                   threshold,
                   top,
                   by_gate};
  const int64_t count = m.gate.count, width = m.gate.width, out = m.down.width;
  if (m.up.count != count || m.down.count != count || m.up.width != width || top > count ||
      threads < 1)
    throw std::invalid_argument("active: weights of different shapes");
  const int64_t rows = out ? y.count() / out : 0;
  if (x.count() != rows * width) throw std::invalid_argument("active: x and y differ in batch");
  const float* inputs = x.rows<const float>("x", width);
  float* outputs = y.rows<float>("y", out);
  const Scratch scratch(kShares * out, count, count, 2 * width, count + 1);
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; ++row)
    kept +=
        run.gated_mlp(m, inputs + row * width, outputs + row * out, scratch.hidden, scratch.index,
                      scratch.scaled, scratch.sums, scratch.coefficients, threads);
  return kept;
}

}  // namespace

void bind_active(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("active_above", &above, Unlocked());
  m.def("active_largest", &largest, Unlocked());
  m.def("active_sum", &sum, Unlocked());
  m.def("active_mlp", &gated_mlp, Unlocked());
}

}  // namespace gossamer
