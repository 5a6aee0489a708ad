// The products with compressed rows, compiled once per instruction set. The including file defines
// kVectors: so many vectors of 16 floats make the widest batch tile; and kLanes: see lanes.hpp.
#pragma once
#include <omp.h>

#include <type_traits>

#include "common/batch_tiles.hpp"
#include "common/lanes.hpp"
#include "csr/csr.hpp"

namespace gossamer {
namespace {

// sums (NV vectors) += the entries from..to of a row times their columns of x.
template <int NV>
__attribute__((always_inline)) inline void row_product(const Csr& m, int64_t from, int64_t to,
                                                       const float* xt, float* y) {
  constexpr int parts = 16 * NV / kLanes;
  auto* out = reinterpret_cast<Lanes*>(y);
  Lanes sums[parts];
  for (int k = 0; k < parts; ++k) sums[k] = out[k];
  for (int64_t e = from; e < to; ++e) {
    const auto* x = reinterpret_cast<const Lanes*>(xt + int64_t{m.columns[e]} * (16 * NV));
    for (int k = 0; k < parts; ++k) sums[k] += m.values[e] * x[k];
  }
  for (int k = 0; k < parts; ++k) out[k] = sums[k];
}

template <int NV>
void product_tile(const Csr& m, const float* bias, const float* xt, float* yt, int64_t from,
                  int64_t to) {
  constexpr int64_t width = 16 * NV;
  for (int64_t r = from; r < to; ++r)
    for (int64_t k = 0; k < width; ++k) yt[r * width + k] = bias ? bias[r] : 0.0f;
  for (int64_t b = 0; b < m.blocks(); ++b) {
    const int64_t *first = m.splits + b * m.rows, *last = first + m.rows;
    for (int64_t r = from; r < to; ++r)
      if (first[r] < last[r]) row_product<NV>(m, first[r], last[r], xt, yt + r * width);
  }
}

template <int NV>
__attribute__((always_inline)) inline Wide dots(const int32_t* columns, int count, const float* xt,
                                                const Wide (&dy)[NV]) {
  Wide v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    v[i] = Wide{};
    if (i >= count) continue;
    const auto* x = reinterpret_cast<const Wide*>(xt + int64_t{columns[i]} * (16 * NV));
    v[i] = dy[0] * x[0];
    for (int k = 1; k < NV; ++k) v[i] += dy[k] * x[k];
  }
  return sums_of(v);
}

template <int NV>
void sampled_tile(const Csr& m, const float* xt, const float* yt, bool add, float* grad,
                  int64_t from, int64_t to) {
  constexpr int64_t width = 16 * NV;
  for (int64_t b = 0; b < m.blocks(); ++b) {
    const int64_t *first = m.splits + b * m.rows, *last = first + m.rows;
    for (int64_t r = from; r < to; ++r) {
      int64_t e = first[r];
      if (e == last[r]) continue;
      Wide dy[NV];
      for (int k = 0; k < NV; ++k) dy[k] = load(yt + r * width + 16 * k);
      for (; e + 16 <= last[r]; e += 16) {
        const Wide found = dots<NV>(m.columns + e, 16, xt, dy);
        store(add ? load(grad + e) + found : found, grad + e);
      }
      if (const int left = static_cast<int>(last[r] - e)) {
        const Wide found = dots<NV>(m.columns + e, left, xt, dy);
        for (int i = 0; i < left; ++i) grad[e + i] = add ? grad[e + i] + found[i] : found[i];
      }
    }
  }
}

inline int64_t entries(const Csr& m) {
  return m.rows ? m.splits[(m.blocks() + 1) * m.rows - 1] : 0;
}

// First row of share i of n: shares hold equal numbers of entries, and a row costs something too.
inline int64_t first_row(const Csr& m, int i, int n) {
  if (i == n || !m.blocks()) return m.rows * i / n;
  const int64_t goal = (entries(m) + m.rows) * i / n;
  int64_t low = 0, high = m.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.splits[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Calls with the number of vectors as a constant: the least of 1, 2, 4 and 8 that holds `vectors`.
template <int NV = 1, class F>
void with_vectors(int vectors, F&& call) {
  if constexpr (NV < kVectors) {
    if (vectors > NV) return with_vectors<2 * NV>(vectors, call);
  }
  call(std::integral_constant<int, NV>{});
}

inline int vectors_of(int64_t count) {
  int found = 0;
  with_vectors(static_cast<int>((count + 15) / 16), [&](auto nv) { found = nv; });
  return found;
}

inline void run_csr_linear(Csr m, Reordered other, const float* x, float* y, int64_t batch,
                           const float* bias, float* xt, float* yt, int threads) {
  const float* values = m.values;
  if (other.places) m.values = other.values;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t from = first_row(m, i, n), to = first_row(m, i + 1, n);
    if (other.places)
      for (int64_t e = entries(m) * i / n; e < entries(m) * (i + 1) / n; ++e)
        other.values[e] = values[other.places[e]];
    for (int64_t at = 0; at < batch; at += 16 * kVectors) {
      const int64_t count = batch - at < 16 * kVectors ? batch - at : 16 * kVectors;
      const int vectors = vectors_of(count);
      transpose_in(x + at * m.cols, m.cols, count, 16 * vectors, m.cols * i / n,
                   m.cols * (i + 1) / n, xt);
#pragma omp barrier
      with_vectors(vectors, [&](auto nv) { product_tile<nv>(m, bias, xt, yt, from, to); });
      transpose_out(y + at * m.rows, m.rows, count, 16 * vectors, from, to, false, yt);
#pragma omp barrier
    }
  }
}

inline void run_csr_sampled(const Csr& m, const float* x, const float* dy, float* grad,
                            int64_t batch, float* xt, float* yt, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t from = first_row(m, i, n), to = first_row(m, i + 1, n);
    for (int64_t at = 0; at < batch; at += 16 * kVectors) {
      const int64_t count = batch - at < 16 * kVectors ? batch - at : 16 * kVectors;
      const int vectors = vectors_of(count);
      transpose_in(x + at * m.cols, m.cols, count, 16 * vectors, m.cols * i / n,
                   m.cols * (i + 1) / n, xt);
      transpose_in(dy + at * m.rows, m.rows, count, 16 * vectors, from, to, yt);
#pragma omp barrier
      with_vectors(vectors, [&](auto nv) { sampled_tile<nv>(m, xt, yt, at > 0, grad, from, to); });
#pragma omp barrier
    }
  }
}

}  // namespace
}  // namespace gossamer
