// Building the SELL form from a bitmap, and its binding. Arrays come by address; Python owns them
// and has checked dtype and contiguity.
#include "sell/bindings.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"
#include "sell/sell.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// The kColumns bits of one row and block.
struct Kept {
  uint64_t low = 0, high = 0;
  int count() const { return __builtin_popcountll(low) + __builtin_popcountll(high); }
  Kept operator&(const Kept& b) const { return {low & b.low, high & b.high}; }
  Kept operator-(const Kept& b) const { return {low & ~b.low, high & ~b.high}; }
  // Takes the lowest column out; kColumns if there is none.
  int take() {
    uint64_t& word = low ? low : high;
    if (!word) return kColumns;
    const int bit = __builtin_ctzll(word) + (low ? 0 : 64);
    word &= word - 1;
    return bit;
  }
  // How many kept columns precede `bit`.
  int rank(int bit) const {
    const uint64_t below = (uint64_t{1} << (bit & 63)) - 1;
    if (bit < 64) return __builtin_popcountll(low & below);
    return __builtin_popcountll(low) + __builtin_popcountll(high & below);
  }
};

struct Bits {
  const uint8_t* data;
  int64_t rows, cols, stride;
  uint64_t word(int64_t row, int64_t w) const {
    if (w * 8 >= stride) return 0;
    uint64_t found;
    std::memcpy(&found, data + row * stride + w * 8, 8);
    return found;
  }
  Kept block(int64_t row, int64_t block) const {
    const int64_t w = block * kColumns / 64, by = block * kColumns % 64;
    const uint64_t a = word(row, w), b = word(row, w + 1), c = by ? word(row, w + 2) : 0;
    Kept kept{by ? a >> by | b << (64 - by) : a, by ? b >> by | c << (64 - by) : b};
    kept.high &= (uint64_t{1} << (kColumns - 64)) - 1;
    return kept;
  }
};

struct Four {
  uint16_t shared, length, rows[kFour];
  bool operator<(const Four& b) const {
    return length != b.length ? length < b.length : shared < b.shared;
  }
};

// The fours of a chunk and block in the order in which they are stored. `kept`: of its rows, and
// one empty row behind them.
std::vector<Four> plan(const std::vector<Kept>& kept) {
  const int none = static_cast<int>(kept.size()) - 1;
  std::vector<uint16_t> order;
  std::vector<int> counts(kept.size());
  for (int r = 0; r < none; ++r)
    if ((counts[r] = kept[r].count())) order.push_back(static_cast<uint16_t>(r));
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return counts[a] < counts[b]; });
  while (order.size() % kFour) order.push_back(static_cast<uint16_t>(none));
  std::vector<Four> fours(order.size() / kFour);
  for (size_t i = 0; i < fours.size(); ++i) {
    const uint16_t* r = &order[i * kFour];
    const int both = std::min((kept[r[0]] & kept[r[1]]).count(), (kept[r[2]] & kept[r[3]]).count());
    const int longest = std::max({counts[r[0]], counts[r[1]], counts[r[2]], counts[r[3]]});
    fours[i] = {static_cast<uint16_t>(both / kShared * kShared), static_cast<uint16_t>(longest),
                {r[0], r[1], r[2], r[3]}};
  }
  std::stable_sort(fours.begin(), fours.end());
  return fours;
}

std::vector<Kept> rows_of(const Bits& bits, int64_t chunk, int64_t size, int64_t block) {
  const int64_t first = chunk * size, last = std::min(first + size, bits.rows);
  std::vector<Kept> kept(size + 1);
  for (int64_t r = first; r < last; ++r) kept[r - first] = bits.block(r, block);
  return kept;
}

// Calls f(at, rows of the block, its fours) for every chunk and block; the calls run side by side.
template <class F>
void for_all(const Bits& bits, int64_t chunk, F f) {
  const int64_t chunks = (bits.rows + chunk - 1) / chunk;
  const int64_t blocks = (bits.cols + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(dynamic)
  for (int64_t at = 0; at < chunks * blocks; ++at) {
    const std::vector<Kept> kept = rows_of(bits, at / blocks, chunk, at % blocks);
    f(at, kept, plan(kept));
  }
}

// offsets (chunks * blocks + 1, 4): where groups, rows, columns and values begin.
void count(uintptr_t bits_at, int64_t rows, int64_t cols, int64_t stride, int64_t chunk,
           uintptr_t offsets_at) {
  const Bits bits{reinterpret_cast<const uint8_t*>(bits_at), rows, cols, stride};
  auto* offsets = reinterpret_cast<int64_t*>(offsets_at);
  std::fill(offsets, offsets + 4, 0);
  for_all(bits, chunk, [&](int64_t at, const std::vector<Kept>&, const std::vector<Four>& fours) {
    int64_t* next = offsets + 4 * (at + 1);
    std::fill(next, next + 4, 0);
    for (size_t i = 0; i < fours.size(); ++i) {
      next[0] += i == 0 || fours[i - 1] < fours[i];
      next[1] += kFour;
      next[2] += fours[i].length * kFour - fours[i].shared * 2;
      next[3] += fours[i].length * kFour;
    }
  });
  const int64_t all = (rows + chunk - 1) / chunk * ((cols + kColumns - 1) / kColumns);
  for (int64_t i = 4; i < 4 * (all + 1); ++i) offsets[i] += offsets[i - 4];
}

// Where a row's values of one block begin, and which columns it keeps there.
template <class T>
struct Row {
  const T* values;
  Kept kept, left;
  T value(int bit) const { return bit == kColumns ? T{0} : values[kept.rank(bit)]; }
};

template <class T>
void write_four(const Four& four, Row<T> (&rows)[kFour], uint8_t*& columns, T*& values) {
  Kept common[2] = {rows[0].kept & rows[1].kept, rows[2].kept & rows[3].kept};
  for (int s = 0; s < four.shared; ++s)
    for (int pair = 0; pair < 2; ++pair) {
      const int bit = common[pair].take();
      *columns++ = static_cast<uint8_t>(bit);
      for (int r = 2 * pair; r < 2 * pair + 2; ++r) *values++ = rows[r].value(bit);
    }
  // What is left of the common columns is not shared.
  for (int r = 0; r < kFour; ++r) {
    const int pair = r / 2;
    const Kept shared = (rows[2 * pair].kept & rows[2 * pair + 1].kept) - common[pair];
    rows[r].left = rows[r].kept - shared;
  }
  for (int s = four.shared; s < four.length; ++s)
    for (auto& row : rows) {
      const int bit = row.left.take();
      *columns++ = static_cast<uint8_t>(bit);
      *values++ = row.value(bit);
    }
}

template <class T>
void fill_all(const Bits& bits, const T* values, const int64_t* row_ptr, int64_t chunk,
              const int64_t* offsets, uint16_t* groups, uint16_t* rows, uint8_t* columns, T* kept) {
  const int64_t blocks = (bits.cols + kColumns - 1) / kColumns;
  // Kept columns of each row before each block.
  std::vector<int32_t> before(bits.rows * blocks);
#pragma omp parallel for
  for (int64_t row = 0; row < bits.rows; ++row)
    for (int64_t block = 1, sum = 0; block < blocks; ++block)
      before[row * blocks + block] =
          static_cast<int32_t>(sum += bits.block(row, block - 1).count());
  for_all(bits, chunk, [&](int64_t at, const std::vector<Kept>& all, const std::vector<Four>& fours) {
    const int64_t* from = offsets + 4 * at;
    uint16_t *sizes = groups + 3 * from[0], *row_at = rows + from[1];
    uint8_t* column_at = columns + from[2];
    T* value_at = kept + from[3];
    for (size_t i = 0; i < fours.size(); ++i) {
      const Four& four = fours[i];
      if (i == 0 || fours[i - 1] < four) {
        if (i > 0) sizes += 3;
        sizes[0] = four.shared, sizes[1] = four.length - four.shared, sizes[2] = 0;
      }
      ++sizes[2];
      Row<T> four_rows[kFour];
      for (int r = 0; r < kFour; ++r) {
        *row_at++ = four.rows[r];
        const int64_t row = at / blocks * chunk + four.rows[r];
        const T* first = values;
        if (four.rows[r] < chunk) first += row_ptr[row] + before[row * blocks + at % blocks];
        four_rows[r] = {first, all[four.rows[r]], {}};
      }
      write_four(four, four_rows, column_at, value_at);
    }
  });
}

// `kept` begins one value into its array: see SellLinear.
void fill(uintptr_t bits_at, uintptr_t values, uintptr_t row_ptr, int64_t rows, int64_t cols,
          int64_t stride, bool bf16, int64_t chunk, uintptr_t offsets, uintptr_t groups,
          uintptr_t rows_at, uintptr_t columns, uintptr_t kept) {
  const Bits bits{reinterpret_cast<const uint8_t*>(bits_at), rows, cols, stride};
  const auto* ptr = reinterpret_cast<const int64_t*>(row_ptr);
  const auto* from = reinterpret_cast<const int64_t*>(offsets);
  auto* sizes = reinterpret_cast<uint16_t*>(groups);
  auto* places = reinterpret_cast<uint16_t*>(rows_at);
  auto* to = reinterpret_cast<uint8_t*>(columns);
  if (bf16)
    fill_all(bits, reinterpret_cast<const uint16_t*>(values), ptr, chunk, from, sizes, places, to,
             reinterpret_cast<uint16_t*>(kept));
  else
    fill_all(bits, reinterpret_cast<const float*>(values), ptr, chunk, from, sizes, places, to,
             reinterpret_cast<float*>(kept));
}

void linear(uintptr_t groups, uintptr_t row_places, uintptr_t columns, uintptr_t values,
            uintptr_t offsets, int64_t rows, int64_t cols, int64_t chunk, bool bf16, uintptr_t x,
            uintptr_t y, int64_t batch, bool x_bf16, uintptr_t bias, bool relu, uintptr_t xt,
            uintptr_t yt, int threads, int isa) {
  check_isa(isa);
  if (rows < 0 || cols < 0 || batch < 0 || threads < 1 || chunk < 1 || xt % 64 || yt % 64)
    throw std::invalid_argument("sell: bad size or scratch");
  const Sell m{reinterpret_cast<const uint16_t*>(groups),
               reinterpret_cast<const uint16_t*>(row_places),
               reinterpret_cast<const uint8_t*>(columns),
               reinterpret_cast<const void*>(values),
               reinterpret_cast<const int64_t*>(offsets),
               rows,
               cols,
               chunk,
               bf16};
  const Dense d{reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), batch, x_bf16};
  SellLinear run = sell_portable;
#if defined(__x86_64__)
  if (isa == kAvx512) run = sell_avx512;
  if (isa == kAvx2) run = sell_avx2;
#endif
  run(m, d, reinterpret_cast<const float*>(bias), relu, reinterpret_cast<float*>(xt),
      reinterpret_cast<float*>(yt), threads);
}

}  // namespace

void bind_sell(nb::module_& m) {
  m.def("sell_count", &count, nb::call_guard<nb::gil_scoped_release>());
  m.def("sell_fill", &fill, nb::call_guard<nb::gil_scoped_release>());
  m.def("sell_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.attr("SELL_COLUMNS") = kColumns;
  m.attr("SELL_BATCH") = kBatch;
}

}  // namespace gossamer
