// Choosing the active inputs, and the bindings of the products over them. Arrays come by address;
// Python owns them and has checked dtype, contiguity and every index.
#include "active/bindings.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "active/active.hpp"
#include "common/isa.hpp"

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

using Shape = nb::tuple;  // values, line scale, across scale, count, width, type

Lines lines(const Shape& parts) {
  const Lines m{reinterpret_cast<const void*>(nb::cast<uintptr_t>(parts[0])),
                reinterpret_cast<const float*>(nb::cast<uintptr_t>(parts[1])),
                reinterpret_cast<const float*>(nb::cast<uintptr_t>(parts[2])),
                nb::cast<int64_t>(parts[3]),
                nb::cast<int64_t>(parts[4]),
                nb::cast<int>(parts[5])};
  if (m.count < 0 || m.count > INT32_MAX || m.width < 0 || m.type < 0 || m.type > kLineInt8)
    throw std::invalid_argument("active: bad lines");
  return m;
}

ActiveAbove pick_above(int isa) {
  check_isa(isa);
#if defined(__x86_64__)
  if (isa == kAvx512) return active_above_avx512;
  if (isa == kAvx2) return active_above_avx2;
#endif
  return active_above_portable;
}

int64_t above(uintptr_t x, int64_t n, float threshold, uintptr_t index, int isa) {
  return pick_above(isa)(reinterpret_cast<const float*>(x), n, threshold,
                         reinterpret_cast<int32_t*>(index));
}

void largest(uintptr_t x, int64_t n, int64_t k, uintptr_t index) {
  if (k < 0 || k > n) throw std::invalid_argument("active: bad count");
  indices_of_largest(reinterpret_cast<const float*>(x), n, k, reinterpret_cast<int32_t*>(index));
}

// Kept from call to call: fresh memory would cost a page fault per 4 KiB, which shows at 1 ms a call.
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

// index 0: those of x above the threshold, x (rows, count) row by row; else the same for all rows.
void sum(const Shape& parts, uintptr_t x, int64_t rows, uintptr_t index, int64_t active,
         float threshold, uintptr_t y, uintptr_t bias, int threads, int isa) {
  check_isa(isa);
  const Lines m = lines(parts);
  if (rows < 0 || active < 0 || threads < 1) throw std::invalid_argument("active: bad size");
  ActiveSum run = active_sum_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = active_sum_avx512;
  if (isa == kAvx2) run = active_sum_avx2;
#endif
  nb::gil_scoped_release released;
  const Scratch scratch(kShares * m.width, std::max(active, m.count), 0, 0, m.count + 1);
  const ActiveAbove choose = pick_above(isa);
  const auto* given = reinterpret_cast<const int32_t*>(index);
  for (int64_t row = 0; row < rows; ++row) {
    const float* input = reinterpret_cast<const float*>(x) + row * m.count;
    if (!index) active = choose(input, m.count, threshold, scratch.index);
    run(m, input, index ? given : scratch.index, active,
        reinterpret_cast<float*>(y) + row * m.width, reinterpret_cast<const float*>(bias),
        scratch.sums, scratch.coefficients, threads);
  }
}

int64_t gated(const Shape& gate, const Shape& up, const Shape& down, float threshold, int64_t top,
              bool by_gate, uintptr_t x, int64_t rows, uintptr_t y, int threads, int isa) {
  check_isa(isa);
  const GatedMlp m{lines(gate), lines(up), lines(down), threshold, top, by_gate};
  const int64_t count = m.gate.count, width = m.gate.width;
  if (m.up.count != count || m.down.count != count || m.up.width != width || top > count ||
      rows < 0 || threads < 1)
    throw std::invalid_argument("active: weights of different shapes");
  ActiveMlp run = active_mlp_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = active_mlp_avx512;
  if (isa == kAvx2) run = active_mlp_avx2;
#endif
  nb::gil_scoped_release released;
  const Scratch scratch(kShares * m.down.width, count, count, 2 * width, count + 1);
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; ++row)
    kept += run(m, reinterpret_cast<const float*>(x) + row * width,
                reinterpret_cast<float*>(y) + row * m.down.width, scratch.hidden, scratch.index,
                scratch.scaled, scratch.sums, scratch.coefficients, threads);
  return kept;
}

}  // namespace

void bind_active(nb::module_& m) {
  m.def("active_above", &above, nb::call_guard<nb::gil_scoped_release>());
  m.def("active_largest", &largest, nb::call_guard<nb::gil_scoped_release>());
  m.def("active_sum", &sum);
  m.def("active_mlp", &gated);
}

}  // namespace gossamer
