// Building the SELL form from a bitmap, and its binding.
#include "sell/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"
#include "common/tensor.hpp"
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

struct Quad {
  uint16_t shared, length, rows[kQuad];
  bool operator<(const Quad& b) const {
    return length != b.length ? length < b.length : shared < b.shared;
  }
};

// The quads of a chunk and block in the order in which they are stored. `kept`: of its rows, and
// one empty row behind them.
std::vector<Quad> plan(const std::vector<Kept>& kept) {
  const int none = static_cast<int>(kept.size()) - 1;
  std::vector<uint16_t> order;
  std::vector<int> counts(kept.size());
  for (int r = 0; r < none; ++r)
    if ((counts[r] = kept[r].count())) order.push_back(static_cast<uint16_t>(r));
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return counts[a] < counts[b]; });
  while (order.size() % kQuad) order.push_back(static_cast<uint16_t>(none));
  std::vector<Quad> quads(order.size() / kQuad);
  for (size_t i = 0; i < quads.size(); ++i) {
    const uint16_t* r = &order[i * kQuad];
    const int both = std::min((kept[r[0]] & kept[r[1]]).count(), (kept[r[2]] & kept[r[3]]).count());
    const int longest = std::max({counts[r[0]], counts[r[1]], counts[r[2]], counts[r[3]]});
    quads[i] = {static_cast<uint16_t>(both / kShared * kShared),
                static_cast<uint16_t>(longest),
                {r[0], r[1], r[2], r[3]}};
  }
  std::stable_sort(quads.begin(), quads.end());
  return quads;
}

std::vector<Kept> rows_of(const Bits& bits, int64_t chunk, int64_t size, int64_t block) {
  const int64_t first = chunk * size, last = std::min(first + size, bits.rows);
  std::vector<Kept> kept(size + 1);
  for (int64_t r = first; r < last; ++r) kept[r - first] = bits.block(r, block);
  return kept;
}

// Calls f(at, rows of the block, its quads) for every chunk and block; the calls run side by side.
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

Bits bits_of(const Tensor& bitmap, int64_t cols) {
  const int64_t rows = bitmap.size(0), stride = (cols + 63) / 64 * 8;
  return {bitmap.data<const uint8_t>("bitmap", {rows, stride}), rows, cols, stride};
}

int64_t parts_of(const Bits& bits, int64_t chunk) {
  if (chunk < 1 || chunk > UINT16_MAX) throw std::invalid_argument("sell: bad chunk");
  return (bits.rows + chunk - 1) / chunk * ((bits.cols + kColumns - 1) / kColumns);
}

// offsets: int64 (chunks * blocks + 1, 4), where groups, rows, columns and values begin.
void count(const Tensor& bitmap, int64_t cols, int64_t chunk, const Tensor& out) {
  const Bits bits = bits_of(bitmap, cols);
  const int64_t all = parts_of(bits, chunk);
  auto* offsets = out.data<int64_t>("offsets", {all + 1, 4});
  std::fill(offsets, offsets + 4, 0);
  for_all(bits, chunk, [&](int64_t at, const std::vector<Kept>&, const std::vector<Quad>& quads) {
    int64_t* next = offsets + 4 * (at + 1);
    std::fill(next, next + 4, 0);
    for (size_t i = 0; i < quads.size(); ++i) {
      next[0] += i == 0 || quads[i - 1] < quads[i];
      next[1] += kQuad;
      next[2] += quads[i].length * kQuad - quads[i].shared * 2;
      next[3] += quads[i].length * kQuad;
    }
  });
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
void write_quad(const Quad& quad, Row<T> (&rows)[kQuad], uint8_t*& columns, T*& values) {
  Kept common[2] = {rows[0].kept & rows[1].kept, rows[2].kept & rows[3].kept};
  for (int s = 0; s < quad.shared; ++s)
    for (int pair = 0; pair < 2; ++pair) {
      const int bit = common[pair].take();
      *columns++ = static_cast<uint8_t>(bit);
      for (int r = 2 * pair; r < 2 * pair + 2; ++r) *values++ = rows[r].value(bit);
    }
  // What is left of the common columns is not shared.
  for (int r = 0; r < kQuad; ++r) {
    const int pair = r / 2;
    const Kept shared = (rows[2 * pair].kept & rows[2 * pair + 1].kept) - common[pair];
    rows[r].left = rows[r].kept - shared;
  }
  for (int s = quad.shared; s < quad.length; ++s)
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
  for_all(bits, chunk,
          [&](int64_t at, const std::vector<Kept>& all, const std::vector<Quad>& quads) {
            const int64_t* from = offsets + 4 * at;
            uint16_t *sizes = groups + 3 * from[0], *row_at = rows + from[1];
            uint8_t* column_at = columns + from[2];
            T* value_at = kept + from[3];
            for (size_t i = 0; i < quads.size(); ++i) {
              const Quad& quad = quads[i];
              if (i == 0 || quads[i - 1] < quad) {
                if (i > 0) sizes += 3;
                sizes[0] = quad.shared, sizes[1] = quad.length - quad.shared, sizes[2] = 0;
              }
              ++sizes[2];
              Row<T> quad_rows[kQuad];
              for (int r = 0; r < kQuad; ++r) {
                *row_at++ = quad.rows[r];
                const int64_t row = at / blocks * chunk + quad.rows[r];
                const T* first = values;
                if (quad.rows[r] < chunk)
                  first += row_ptr[row] + before[row * blocks + at % blocks];
                quad_rows[r] = {first, all[quad.rows[r]], {}};
              }
              write_quad(quad, quad_rows, column_at, value_at);
            }
          });
}

// `kept` has one value more than are written, before them: see SellKernels.
void fill(const Tensor& bitmap, const Tensor& values, const Tensor& row_ptr, int64_t cols,
          int64_t chunk, const Tensor& offsets, const Tensor& groups, const Tensor& rows,
          const Tensor& columns, const Tensor& kept) {
  const Bits bits = bits_of(bitmap, cols);
  const auto* ptr = row_ptr.data<const int64_t>("row offsets", {bits.rows + 1});
  const void* from = values.floats("values", {ptr[bits.rows]});
  const int64_t all = parts_of(bits, chunk);
  const auto* at = offsets.data<const int64_t>("offsets", {all + 1, 4});
  auto* sizes = groups.data<uint16_t>("groups", {at[4 * all], 3});
  auto* places = rows.data<uint16_t>("rows", {at[4 * all + 1]});
  auto* to = columns.data<uint8_t>("columns", {at[4 * all + 2]});
  void* stored = kept.floats("kept", {at[4 * all + 3] + 1});
  if (values.type() != kept.type()) throw std::invalid_argument("sell: values of two types");
  if (values.is_bf16())
    fill_all(bits, static_cast<const uint16_t*>(from), ptr, chunk, at, sizes, places, to,
             static_cast<uint16_t*>(stored) + 1);
  else
    fill_all(bits, static_cast<const float*>(from), ptr, chunk, at, sizes, places, to,
             static_cast<float*>(stored) + 1);
}

class SellMatrix {
 public:
  SellMatrix(const Tensor& values, const Tensor& columns, const Tensor& rows, const Tensor& groups,
             const Tensor& offsets, int64_t out, int64_t cols, int64_t chunk)
      : kept_{values.owner(), columns.owner(), rows.owner(), groups.owner(), offsets.owner()} {
    const int64_t all = parts_of({nullptr, out, cols, 0}, chunk);
    view_.offsets = offsets.data<const int64_t>("offsets", {all + 1, 4});
    const int64_t* end = view_.offsets + 4 * all;
    view_.groups = groups.data<const uint16_t>("groups", {end[0], 3});
    view_.places = rows.data<const uint16_t>("rows", {end[1]});
    view_.columns = columns.data<const uint8_t>("columns", {end[2]});
    view_.bf16 = values.is_bf16();
    view_.values = static_cast<const char*>(values.floats("values", {end[3] + 1})) +
                   (view_.bf16 ? sizeof(uint16_t) : sizeof(float));
    view_.rows = out, view_.cols = cols, view_.chunk = chunk;
  }

  // x (..., cols) and y (..., rows), both float32 or both bfloat16; bias float32.
  void linear(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias, bool relu,
              const Tensor& xt, const Tensor& yt, int threads, int isa) const {
    const int64_t batch = view_.rows ? y.count() / view_.rows : 0;
    const int64_t width = batch < kBatch ? (batch + 15) / 16 * 16 : kBatch;
    if (threads < 1 || x.count() != batch * view_.cols || x.is_bf16() != y.is_bf16())
      throw std::invalid_argument("sell: x and y do not fit each other");
    const Dense dense{x.float_rows("x", view_.cols), y.float_rows("y", view_.rows), batch,
                      x.is_bf16()};
    kernels<SellKernels>(isa).linear(
        view_, dense, bias ? bias->data<const float>("bias", {view_.rows}) : nullptr, relu,
        xt.scratch("xt", view_.blocks() * (kColumns + 1) * width),
        yt.scratch("yt", threads * (view_.chunk + 1) * kBatch), threads);
  }

 private:
  Sell view_{};
  std::array<nb::object, 5> kept_;
};

}  // namespace

void bind_sell(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("sell_count", &count, Unlocked());
  m.def("sell_fill", &fill, Unlocked());
  nb::class_<SellMatrix>(m, "SellMatrix")
      .def(nb::init<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    int64_t, int64_t, int64_t>())
      .def("linear", &SellMatrix::linear, Unlocked());
  m.attr("SELL_COLUMNS") = kColumns;
  m.attr("SELL_BATCH") = kBatch;
}

}  // namespace gossamer
