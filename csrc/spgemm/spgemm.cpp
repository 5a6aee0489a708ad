#include "spgemm/spgemm.hpp"

#include <algorithm>
#include <vector>

namespace gossamer {
namespace {

constexpr int32_t kFree = -1;
constexpr int kChunk = 32;  // rows that a thread takes at a time
constexpr int64_t kAhead = 8;
constexpr size_t kSecondLevel = 1 << 19;

template <class T>
struct Entry {
  int32_t key;
  T sum;
};
template <>
struct Entry<void> {
  int32_t key;
};

// Open addressing with linear probing, at most a quarter full, since a mispredicted probe costs
// more than room in the cache; or, where one slot per column fits the second-level cache or is no
// more than that, one slot per column, which needs no probing. Between rows every slot is free.
template <class T>
class Table {
 public:
  void prepare(int64_t most, int64_t cols) {
    int bits = 4;
    while (int64_t{1} << bits < 4 * most) ++bits;
    direct_ = (int64_t{1} << bits) >= cols || cols * sizeof(Entry<T>) <= kSecondLevel;
    const int64_t size = direct_ ? cols : int64_t{1} << bits;
    shift_ = 32 - bits;
    mask_ = static_cast<uint32_t>(size - 1);
    if (static_cast<int64_t>(slots_.size()) < size) slots_.resize(size, free_slot());
  }
  bool direct() const { return direct_; }
  // The slot that holds the column, or the free one where it belongs.
  template <bool Direct>
  int32_t find(int32_t column) const {
    if constexpr (Direct) return column;
    uint32_t at = static_cast<uint32_t>(column) * 2654435769u >> shift_;
    while (slots_[at].key != column && slots_[at].key != kFree) at = (at + 1) & mask_;
    return static_cast<int32_t>(at);
  }
  Entry<T>* slots() { return slots_.data(); }

 private:
  static Entry<T> free_slot() {
    Entry<T> slot{};
    slot.key = kFree;
    return slot;
  }
  std::vector<Entry<T>> slots_;
  uint32_t mask_ = 0;
  int shift_ = 0;
  bool direct_ = false;
};

// Multiplications of row i of a * b.
inline int64_t products(const Rows& a, const Rows& b, int64_t i) {
  int64_t sum = 0;
  for (int64_t p = a.row_ptr[i]; p < a.row_ptr[i + 1]; ++p)
    sum += b.row_ptr[a.columns[p] + 1] - b.row_ptr[a.columns[p]];
  return sum;
}

// The rows of b are anywhere in memory: asks for one some way ahead, and for the offset of one
// twice as far, also beyond this row of a.
inline void ask(const Rows& a, const Rows& b, int64_t p, int64_t stored, size_t width) {
  if (p + 2 * kAhead >= stored) return;
  __builtin_prefetch(b.row_ptr + a.columns[p + 2 * kAhead]);
  const int64_t at = b.row_ptr[a.columns[p + kAhead]];
  __builtin_prefetch(b.columns + at);
  if (width) __builtin_prefetch(static_cast<const char*>(b.values) + at * width);
}

// Ascending; by comparisons where few, else in passes over digits of at most 11 bits, which branch
// on nothing. `other` has room for as many.
void sort_columns(int32_t* columns, int64_t count, int64_t cols, int32_t* other) {
  int bits = 1;
  while (int64_t{1} << bits < cols) ++bits;
  const int passes = bits <= 11 ? 1 : bits <= 22 ? 2 : 3, digit = (bits + passes - 1) / passes;
  if (count < 24 || count * 8 < int64_t{1} << digit) {
    std::sort(columns, columns + count);
    return;
  }
  int32_t* from = columns;
  const uint32_t mask = (1u << digit) - 1;
  for (int pass = 0; pass < passes; ++pass) {
    int32_t places[1 << 11] = {};
    const int shift = pass * digit;
    for (int64_t k = 0; k < count; ++k) ++places[from[k] >> shift & mask];
    for (int32_t d = 0, sum = 0; d <= static_cast<int32_t>(mask); ++d) {
      const int32_t here = places[d];
      places[d] = sum;
      sum += here;
    }
    for (int64_t k = 0; k < count; ++k) other[places[from[k] >> shift & mask]++] = from[k];
    std::swap(from, other);
  }
  if (from != columns) std::copy(from, from + count, columns);
}

template <bool Direct>
int64_t count_row(const Rows& a, const Rows& b, int64_t i, Table<void>& table, int32_t* found) {
  Entry<void>* slots = table.slots();
  const int64_t last = a.row_ptr[i + 1], stored = a.row_ptr[a.rows];
  int64_t count = 0;
  for (int64_t p = a.row_ptr[i]; p < last; ++p) {
    ask(a, b, p, stored, 0);
    const int64_t row = a.columns[p];
    for (int64_t q = b.row_ptr[row]; q < b.row_ptr[row + 1]; ++q) {
      const int32_t at = table.find<Direct>(b.columns[q]);
      if (slots[at].key != kFree) continue;
      slots[at].key = b.columns[q];
      found[count++] = at;
    }
  }
  for (int64_t k = 0; k < count; ++k) slots[found[k]].key = kFree;
  return count;
}

template <class T, bool Direct>
void fill_row(const Rows& a, const Rows& b, int64_t i, Table<T>& table, bool sorted, int32_t* found,
              int32_t* columns, T* values) {
  const T *left = static_cast<const T*>(a.values), *right = static_cast<const T*>(b.values);
  Entry<T>* slots = table.slots();
  const int64_t last = a.row_ptr[i + 1], stored = a.row_ptr[a.rows];
  int64_t count = 0;
  for (int64_t p = a.row_ptr[i]; p < last; ++p) {
    ask(a, b, p, stored, sizeof(T));
    const int64_t row = a.columns[p];
    const T factor = left[p];
    for (int64_t q = b.row_ptr[row]; q < b.row_ptr[row + 1]; ++q) {
      const int32_t at = table.template find<Direct>(b.columns[q]);
      if (slots[at].key == kFree) {
        slots[at] = {b.columns[q], factor * right[q]};
        columns[count] = b.columns[q];
        found[count++] = at;
      } else {
        slots[at].sum += factor * right[q];
      }
    }
  }
  if (sorted) {
    sort_columns(columns, count, b.cols, found + count);
    for (int64_t k = 0; k < count; ++k)
      values[k] = slots[table.template find<Direct>(columns[k])].sum;
  } else {
    for (int64_t k = 0; k < count; ++k) values[k] = slots[found[k]].sum;
  }
  for (int64_t k = 0; k < count; ++k) slots[found[k]].key = kFree;
}

template <class T>
void fill_all(const Rows& a, const Rows& b, const int64_t* row_ptr, bool sorted, int32_t* columns,
              void* values, int threads) {
  auto* out = static_cast<T*>(values);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Table<T> table;
    std::vector<int32_t> found;
#pragma omp for schedule(dynamic, kChunk)
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t first = row_ptr[i], count = row_ptr[i + 1] - first;
      table.prepare(count, b.cols);
      if (static_cast<int64_t>(found.size()) < 2 * count) found.resize(2 * count);
      if (table.direct())
        fill_row<T, true>(a, b, i, table, sorted, found.data(), columns + first, out + first);
      else fill_row<T, false>(a, b, i, table, sorted, found.data(), columns + first, out + first);
    }
  }
}

}  // namespace

void spgemm_count(const Rows& a, const Rows& b, int64_t* counts, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Table<void> table;
    std::vector<int32_t> found;
#pragma omp for schedule(dynamic, kChunk)
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t most = std::min(products(a, b, i), b.cols);
      if (a.row_ptr[i + 1] - a.row_ptr[i] <= 1) {
        counts[i] = most;  // one row of b, whose columns are distinct
        continue;
      }
      table.prepare(most, b.cols);
      if (static_cast<int64_t>(found.size()) < most) found.resize(most);
      counts[i] = table.direct() ? count_row<true>(a, b, i, table, found.data())
                                 : count_row<false>(a, b, i, table, found.data());
    }
  }
}

void spgemm_multiply(const Rows& a, const Rows& b, const int64_t* row_ptr, bool sorted,
                     int32_t* columns, void* values, int threads) {
  if (a.wide) fill_all<double>(a, b, row_ptr, sorted, columns, values, threads);
  else fill_all<float>(a, b, row_ptr, sorted, columns, values, threads);
}

}  // namespace gossamer
