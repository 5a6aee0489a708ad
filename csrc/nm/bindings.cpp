// Bindings of the N:M products. Arrays come by address; Python owns them and has checked dtype and
// contiguity. Codes cannot point outside a padded input, so no content can make a kernel stray.
#include "nm/bindings.hpp"

#include <nanobind/stl/array.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"

namespace nb = nanobind;

namespace gossamer {

Nm nm_view(const NmArgs& a) {
  const int64_t rows = a[2], cols = a[3], keep = a[4], group = a[5];
  if (rows < 0 || cols < 0 || group < 2 || group > 32 || group & (group - 1) || keep < 1 ||
      keep >= group)
    throw std::invalid_argument("nm: bad size");
  Nm m{reinterpret_cast<const uint8_t*>(a[0]), reinterpret_cast<const void*>(a[1]), rows, 0,
       static_cast<int>(keep), static_cast<int>(group), a[8] != 0};
  m.spans = (cols + m.span_columns() - 1) / m.span_columns();
  if (a[6] != m.code_bytes() || a[7] != m.blocks() * kLaneCount)
    throw std::invalid_argument("nm: codes or values do not fit the shape");
  return m;
}

NmRows pick_nm_rows(int isa) {
#if defined(__x86_64__)
  if (isa == kAvx512) return nm_rows_avx512;
  if (isa == kAvx2) return nm_rows_avx2;
#endif
  (void)isa;
  return nm_rows_portable;
}

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

// Throws where places in a group do not ascend, an unused bit is set, or padding is not zero.
void check(const NmArgs& matrix) {
  const Nm m = nm_view(matrix);
  for (int64_t r = 0; r < m.rows; ++r) check_row(m, r, matrix[3]);
}

// x (batch, cols), float32, y (batch, rows): padded here, because small layers are called so often
// that every tensor operation around the kernel would cost more than the kernel.
void matvec(const NmArgs& matrix, uintptr_t x, int64_t batch, uintptr_t y, uintptr_t bias,
            int threads, int isa) {
  check_isa(isa);
  if (batch < 1 || batch > 8 || threads < 1) throw std::invalid_argument("nm: bad batch");
  const Nm m = nm_view(matrix);
  const int64_t cols = matrix[3], padded = m.padded();
  const auto* input = reinterpret_cast<const float*>(x);
  thread_local std::vector<float> wide;
  if (padded != cols || x % 64) {
    wide.assign(batch * padded + 16, 0.0f);
    float* aligned = wide.data() + (64 - reinterpret_cast<uintptr_t>(wide.data()) % 64) / 4 % 16;
    for (int64_t b = 0; b < batch; ++b)
      if (cols) std::memcpy(aligned + b * padded, input + b * cols, cols * sizeof(float));
    input = aligned;
  }
  NmMatvec run = nm_matvec_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = nm_matvec_avx512;
  if (isa == kAvx2) run = nm_matvec_avx2;
#endif
  run(m, input, batch, reinterpret_cast<float*>(y), reinterpret_cast<const float*>(bias), threads);
}

void unpack(const NmArgs& matrix, int64_t from, int64_t to, uintptr_t out, int threads, int isa) {
  check_isa(isa);
  const Nm m = nm_view(matrix);
  if (from < 0 || to < from || to > m.rows || threads < 1)
    throw std::invalid_argument("nm: bad rows");
  if (from == to || matrix[3] == 0) return;  // nowhere to write
  NmUnpack run = nm_unpack_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = nm_unpack_avx512;
  if (isa == kAvx2) run = nm_unpack_avx2;
#endif
  run(m, matrix[3], from, to, reinterpret_cast<float*>(out), threads);
}

}  // namespace

void bind_nm(nb::module_& m) {
  m.def("nm_check", &check, nb::call_guard<nb::gil_scoped_release>());
  m.def("nm_matvec", &matvec, nb::call_guard<nb::gil_scoped_release>());
  m.def("nm_unpack", &unpack, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer
