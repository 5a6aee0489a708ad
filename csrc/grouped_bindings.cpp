// Building the pattern-grouped form from a bitmap, and its binding. Arrays come by address; Python
// owns them and has checked dtype and contiguity.
#include "grouped_bindings.hpp"

#include <cstring>
#include <stdexcept>

#include "bitmap.hpp"
#include "grouped.hpp"
#include "isa.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// The words of a tile's four rows at word w; rows beyond the matrix keep nothing.
void words_at(const uint8_t* bits, int64_t rows, int64_t stride, int64_t tile, int64_t w,
              uint64_t (&out)[kTile]) {
  for (int64_t r = 0; r < kTile; ++r) {
    const int64_t row = tile * kTile + r;
    out[r] = 0;
    if (row < rows) std::memcpy(&out[r], bits + row * stride + w * 8, 8);
  }
}

// The columns of a word that exactly the rows in `pattern` keep.
uint64_t matches(const uint64_t (&words)[kTile], int pattern) {
  uint64_t found = ~uint64_t{0};
  for (int r = 0; r < kTile; ++r) found &= pattern >> r & 1 ? words[r] : ~words[r];
  return found;
}

// Counts per pattern and the offsets that follow; block after block, tile after tile.
void count(uintptr_t bits_at, int64_t rows, int64_t cols, int64_t stride, uintptr_t counts_at,
           uintptr_t column_ptr_at, uintptr_t value_ptr_at) {
  const auto* bits = reinterpret_cast<const uint8_t*>(bits_at);
  auto* counts = reinterpret_cast<uint16_t*>(counts_at);
  auto* column_ptr = reinterpret_cast<int64_t*>(column_ptr_at);
  auto* value_ptr = reinterpret_cast<int64_t*>(value_ptr_at);
  const int64_t tiles = (rows + kTile - 1) / kTile, blocks = (cols + kBlock - 1) / kBlock;
  const int64_t per_block = kBlock / 64, words = stride / 8;
  column_ptr[0] = value_ptr[0] = 0;
  for (int64_t at = 0; at < blocks * tiles; ++at) {
    const int64_t first = at / tiles * per_block;
    const int64_t last = first + per_block < words ? first + per_block : words;
    int64_t columns = 0, values = 0, totals[kPatterns] = {};
    for (int64_t w = first; w < last; ++w) {
      uint64_t four[kTile];
      words_at(bits, rows, stride, at % tiles, w, four);
      for (int p = 1; p < kPatterns; ++p) totals[p] += __builtin_popcountll(matches(four, p));
    }
    for (int p = 0; p < kPatterns; ++p) {
      counts[at * kPatterns + p] = static_cast<uint16_t>(totals[p]);
      columns += totals[p];
      values += totals[p] * __builtin_popcount(p);
    }
    column_ptr[at + 1] = column_ptr[at] + columns;
    value_ptr[at + 1] = value_ptr[at] + values;
  }
}

template <class T>
void fill_tile(const uint8_t* bits, const T* values, const int64_t* row_ptr, int64_t rows,
               int64_t stride, int64_t tile, int64_t first, int64_t last, const uint16_t* counts,
               uint16_t* columns, T* kept) {
  uint16_t* column_at[kPatterns];
  T* kept_at[kPatterns];
  const T* row_at[kTile] = {};
  for (int p = 1; p < kPatterns; ++p) {
    column_at[p] = columns, kept_at[p] = kept;
    columns += counts[p], kept += counts[p] * __builtin_popcount(p);
  }
  for (int64_t r = 0; r < kTile && tile * kTile + r < rows; ++r) {
    const int64_t row = tile * kTile + r;
    row_at[r] = values + row_ptr[row];
    for (int64_t w = 0; w < first; ++w) {
      uint64_t word;
      std::memcpy(&word, bits + row * stride + w * 8, 8);
      row_at[r] += __builtin_popcountll(word);
    }
  }
  for (int64_t w = first; w < last; ++w) {
    uint64_t four[kTile];
    words_at(bits, rows, stride, tile, w, four);
    for (int p = 1; p < kPatterns; ++p)
      for (uint64_t left = matches(four, p); left; left &= left - 1) {
        const int bit = __builtin_ctzll(left);
        const uint64_t below = (uint64_t{1} << bit) - 1;
        *column_at[p]++ = static_cast<uint16_t>((w - first) * 64 + bit);
        for (int r = 0; r < kTile; ++r)
          if (p >> r & 1) *kept_at[p]++ = row_at[r][__builtin_popcountll(four[r] & below)];
      }
    for (int r = 0; r < kTile; ++r)
      if (row_at[r]) row_at[r] += __builtin_popcountll(four[r]);
  }
}

template <class T>
void fill_all(const uint8_t* bits, const T* values, const int64_t* row_ptr, int64_t rows,
              int64_t cols, int64_t stride, const uint16_t* counts, const int64_t* column_ptr,
              const int64_t* value_ptr, uint16_t* columns, T* kept) {
  const int64_t tiles = (rows + kTile - 1) / kTile, blocks = (cols + kBlock - 1) / kBlock;
  const int64_t per_block = kBlock / 64, words = stride / 8;
  for (int64_t at = 0; at < blocks * tiles; ++at) {
    const int64_t first = at / tiles * per_block;
    fill_tile<T>(bits, values, row_ptr, rows, stride, at % tiles, first,
                 first + per_block < words ? first + per_block : words, counts + at * kPatterns,
                 columns + column_ptr[at], kept + value_ptr[at]);
  }
}

// `kept` begins one value into its array: see GroupedLinear.
void fill(uintptr_t bits, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t cols,
          int64_t stride, bool bf16, uintptr_t counts, uintptr_t column_ptr, uintptr_t value_ptr,
          uintptr_t columns, uintptr_t kept) {
  const auto* from = reinterpret_cast<const uint8_t*>(bits);
  const auto* offsets = reinterpret_cast<const int64_t*>(row_ptr);
  const auto* totals = reinterpret_cast<const uint16_t*>(counts);
  const auto* column_at = reinterpret_cast<const int64_t*>(column_ptr);
  const auto* value_at = reinterpret_cast<const int64_t*>(value_ptr);
  auto* to = reinterpret_cast<uint16_t*>(columns);
  if (bf16)
    fill_all(from, reinterpret_cast<const uint16_t*>(values), offsets, rows, cols, stride, totals,
             column_at, value_at, to, reinterpret_cast<uint16_t*>(kept));
  else
    fill_all(from, reinterpret_cast<const float*>(values), offsets, rows, cols, stride, totals,
             column_at, value_at, to, reinterpret_cast<float*>(kept));
}

void linear(uintptr_t counts, uintptr_t columns, uintptr_t values, uintptr_t column_ptr,
            uintptr_t value_ptr, int64_t rows, int64_t cols, bool bf16, uintptr_t x, uintptr_t y,
            int64_t batch, bool x_bf16, uintptr_t bias, bool relu, uintptr_t xt, uintptr_t yt,
            int threads, int isa) {
  check_isa(isa);
  if (rows < 0 || cols < 0 || batch < 0 || threads < 1 || xt % 64 || yt % 64)
    throw std::invalid_argument("grouped: bad size or scratch");
  const Grouped m{reinterpret_cast<const uint16_t*>(counts),
                  reinterpret_cast<const uint16_t*>(columns),
                  reinterpret_cast<const void*>(values),
                  reinterpret_cast<const int64_t*>(column_ptr),
                  reinterpret_cast<const int64_t*>(value_ptr),
                  rows,
                  cols,
                  bf16};
  const Dense d{reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), batch, x_bf16};
  GroupedLinear run = grouped_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = grouped_avx512;
  if (isa == kAvx2) run = grouped_avx2;
#endif
  run(m, d, reinterpret_cast<const float*>(bias), relu, reinterpret_cast<float*>(xt),
      reinterpret_cast<float*>(yt), threads);
}

}  // namespace

void bind_grouped(nb::module_& m) {
  m.def("grouped_count", &count, nb::call_guard<nb::gil_scoped_release>());
  m.def("grouped_fill", &fill, nb::call_guard<nb::gil_scoped_release>());
  m.def("grouped_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.attr("GROUPED_BLOCK") = kBlock;
}

}  // namespace gossamer
