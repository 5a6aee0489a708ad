// Active-neuron products, compiled once per instruction set.
#pragma once
#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>

#include "active/active.hpp"
#include "common/batch_tiles.hpp"

namespace gossamer {
namespace {

inline float widen(int8_t value) { return static_cast<float>(value); }
// The compiler's own conversion of 16 bytes goes through memory one by one.
inline Wide load(const int8_t* from) {
#if defined(__AVX512F__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Wide>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
#elif defined(__AVX2__)
  Wide found;
  auto* halves = reinterpret_cast<__m256*>(&found);
  for (int h = 0; h < 2; ++h) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * h));
    halves[h] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
  }
  return found;
#else
  Wide found;
  for (int lane = 0; lane < 16; ++lane) found[lane] = static_cast<float>(from[lane]);
  return found;
#endif
}

constexpr int kAtOnce = 4;  // neurons whose streams from memory are in flight together

// A cache line of each stream: 1, 2 or 4 vectors.
template <class T>
constexpr int kVectorsPerCacheLine = 4 / sizeof(T);

// y[from..to) += sum of C neurons times their coefficients; asks for the neurons that come next.
template <class T, int C>
void add_neurons(const T* const* neurons, const T* const* next, const float* coefficients,
                 int64_t from, int64_t to, float* y) {
  constexpr int V = kVectorsPerCacheLine<T>;
  int64_t j = from;
  for (; j + 16 * V <= to; j += 16 * V) {
    Wide sums[V];
    for (int v = 0; v < V; ++v) sums[v] = load(y + j + 16 * v);
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(next[c] + j, 0, 2);
      for (int v = 0; v < V; ++v) sums[v] += coefficients[c] * load(neurons[c] + j + 16 * v);
    }
    for (int v = 0; v < V; ++v) store(sums[v], y + j + 16 * v);
  }
  for (; j < to; ++j)
    for (int c = 0; c < C; ++c) y[j] += coefficients[c] * widen(neurons[c][j]);
}

// Neurons first..last of the index list into y[from..to). They come in fours, and the next four are
// asked for: the processor's own prefetching stops at a page, which a neuron may not even fill.
template <class T>
void add_share(const Neurons& m, const int32_t* index, int64_t active, const float* coefficients,
               int64_t first, int64_t last, int64_t from, int64_t to, float* y) {
  const T* values = static_cast<const T*>(m.values);
  for (int64_t j = from; j < to; ++j) y[j] = 0.0f;
  for (int64_t k = first; k < last; k += kAtOnce) {
    const T *neurons[kAtOnce], *next[kAtOnce];
    for (int c = 0; c < kAtOnce; ++c) {
      const int64_t later = k + kAtOnce + c;
      neurons[c] = values + index[k + c < last ? k + c : last - 1] * m.width;
      next[c] = values + index[later < active ? later : active - 1] * m.width;
    }
    switch (last - k) {
      case 1: add_neurons<T, 1>(neurons, next, coefficients + k, from, to, y); break;
      case 2: add_neurons<T, 2>(neurons, next, coefficients + k, from, to, y); break;
      case 3: add_neurons<T, 3>(neurons, next, coefficients + k, from, to, y); break;
      default: add_neurons<T, kAtOnce>(neurons, next, coefficients + k, from, to, y);
    }
  }
}

// y[from..to): the shares in their order, times the scales across the neurons, plus bias.
inline void finish(const Neurons& m, const float* bias, const float* sums, int64_t shares,
                   int64_t from, int64_t to, float* y) {
  int64_t j = from;
  for (; j + 16 <= to; j += 16) {
    Wide sum = load(sums + j);
    for (int64_t share = 1; share < shares; ++share) sum += load(sums + share * m.width + j);
    if (m.across_scale) sum *= load(m.across_scale + j);
    if (bias) sum += load(bias + j);
    store(sum, y + j);
  }
  for (; j < to; ++j) {
    float sum = sums[j];
    for (int64_t share = 1; share < shares; ++share) sum += sums[share * m.width + j];
    if (m.across_scale) sum *= m.across_scale[j];
    y[j] = bias ? sum + bias[j] : sum;
  }
}

// All threads of a team call this together; y is complete for all of them afterwards.
template <class T>
void team_sum(const Neurons& m, const float* x, const int32_t* index, int64_t active, float* y,
              const float* bias, float* sums, float* coefficients) {
  const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
  for (int64_t k = active * i / n; k < active * (i + 1) / n; ++k)
    coefficients[k] = x[index[k]] * (m.neuron_scale ? m.neuron_scale[index[k]] : 1.0f);
  const int64_t shares = active < 16 * kShares ? 1 : kShares;
  const int64_t slices = (n + shares - 1) / shares, blocks = (m.width + 63) / 64;
#pragma omp barrier
  const int64_t tasks = shares * slices;
  for (int64_t task = tasks * i / n; task < tasks * (i + 1) / n; ++task) {
    const int64_t share = task / slices, slice = task % slices;
    const int64_t end = blocks * (slice + 1) / slices * 64;
    add_share<T>(m, index, active, coefficients, active * share / shares,
                 active * (share + 1) / shares, blocks * slice / slices * 64,
                 end < m.width ? end : m.width, sums + share * m.width);
  }
#pragma omp barrier
  const int64_t from = blocks * i / n * 64, end = blocks * (i + 1) / n * 64;
  finish(m, bias, sums, shares, from, end < m.width ? end : m.width, y);
#pragma omp barrier
}

inline void sum_dispatch(const Neurons& m, const float* x, const int32_t* index, int64_t active,
                         float* y, const float* bias, float* sums, float* coefficients) {
  if (m.type == kNeuronInt8) team_sum<int8_t>(m, x, index, active, y, bias, sums, coefficients);
  else if (m.type == kNeuronBf16)
    team_sum<uint16_t>(m, x, index, active, y, bias, sums, coefficients);
  else team_sum<float>(m, x, index, active, y, bias, sums, coefficients);
}

inline void run_active_sum(const Neurons& m, const float* x, const int32_t* index, int64_t active,
                           float* y, const float* bias, float* sums, float* coefficients,
                           int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  sum_dispatch(m, x, index, active, y, bias, sums, coefficients);
}

// The products of C neurons with x, each in two sums for the latency of fused multiply-add.
template <class T, int C>
void dot_neurons(const T* const* neurons, const T* const* next, const float* x, int64_t width,
                 float* out) {
  constexpr int V = kVectorsPerCacheLine<T>;
  Wide sums[C][2] = {};
  int64_t j = 0;
  for (; j + 16 * V <= width; j += 16 * V)
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(next[c] + j, 0, 2);
      for (int v = 0; v < V; ++v)
        sums[c][v % 2] += load(neurons[c] + j + 16 * v) * load(x + j + 16 * v);
    }
  for (int c = 0; c < C; ++c) {
    const Wide all = sums[c][0] + sums[c][1];
    out[c] = 0.0f;
    for (int lane = 0; lane < 16; ++lane) out[c] += all[lane];
    for (int64_t k = j; k < width; ++k) out[c] += widen(neurons[c][k]) * x[k];
  }
}

// out[i] = neuron index[i] (neuron i without an index) times x, for first <= i < last.
template <class T>
void dot_share(const Neurons& m, const int32_t* index, const float* x, int64_t first, int64_t last,
               float* out) {
  const T* values = static_cast<const T*>(m.values);
  for (int64_t k = first; k < last; k += kAtOnce) {
    const T *neurons[kAtOnce], *next[kAtOnce];
    for (int c = 0; c < kAtOnce; ++c) {
      const int64_t here = k + c < last ? k + c : last - 1;
      const int64_t later = k + kAtOnce + c < last ? k + kAtOnce + c : last - 1;
      neurons[c] = values + (index ? index[here] : here) * m.width;
      next[c] = values + (index ? index[later] : later) * m.width;
    }
    float products[kAtOnce];
    if (last - k >= kAtOnce) dot_neurons<T, kAtOnce>(neurons, next, x, m.width, products);
    else
      for (int c = 0; c < last - k; ++c)
        dot_neurons<T, 1>(neurons + c, next + c, x, m.width, products + c);
    for (int c = 0; c < kAtOnce && k + c < last; ++c) {
      const int64_t neuron = index ? index[k + c] : k + c;
      out[k + c] = products[c] * (m.neuron_scale ? m.neuron_scale[neuron] : 1.0f);
    }
  }
}

inline void dot_dispatch(const Neurons& m, const int32_t* index, const float* x, int64_t first,
                         int64_t last, float* out) {
  if (m.type == kNeuronInt8) dot_share<int8_t>(m, index, x, first, last, out);
  else if (m.type == kNeuronBf16) dot_share<uint16_t>(m, index, x, first, last, out);
  else dot_share<float>(m, index, x, first, last, out);
}

// x, times the scales across a neuron where there are any.
inline const float* scaled(const Neurons& m, const float* x, float* scratch) {
  if (!m.across_scale) return x;
  for (int64_t j = 0; j < m.width; ++j) scratch[j] = x[j] * m.across_scale[j];
  return scratch;
}

inline int64_t find_above(const float* x, int64_t n, float threshold, int32_t* index) {
  const int32_t limit = magnitude(threshold);
  int64_t count = 0, j = 0;
#if defined(__AVX512F__)
  __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; j + 16 <= n; j += 16) {
    const __m512i size = _mm512_and_epi32(_mm512_loadu_si512(x + j), _mm512_set1_epi32(0x7fffffff));
    const __mmask16 kept = _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(limit));
    _mm512_mask_compressstoreu_epi32(index + count, kept, places);
    count += __builtin_popcount(kept);
    places = _mm512_add_epi32(places, _mm512_set1_epi32(16));
  }
#endif
  for (; j < n; ++j) {
    index[count] = static_cast<int32_t>(j);  // overwritten unless kept: no branch
    count += magnitude(x[j]) > limit;
  }
  return count;
}

inline int64_t choose(const GatedMlp& m, const float* hidden, int32_t* index) {
  if (m.top < 0) return find_above(hidden, m.gate.count, m.threshold, index);
  indices_of_largest(hidden, m.gate.count, m.top, index);
  return m.top;
}

// Gate (and up) of every neuron, then the choice, then up (where the gate alone chose) and down of
// the kept neurons only. `coefficients` holds the up products until the sum overwrites it.
inline int64_t run_gated(const GatedMlp& m, const float* x, float* y, float* hidden, int32_t* index,
                         float* x_scaled, float* sums, float* coefficients, int threads) {
  const float* gate_x = scaled(m.gate, x, x_scaled);
  const float* up_x = scaled(m.up, x, x_scaled + m.up.width);
  int64_t kept = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t first = m.gate.count * i / n, last = m.gate.count * (i + 1) / n;
    dot_dispatch(m.gate, nullptr, gate_x, first, last, hidden);
    if (!m.by_gate) dot_dispatch(m.up, nullptr, up_x, first, last, coefficients);
    for (int64_t k = first; k < last; ++k) {
      hidden[k] /= 1.0f + std::exp(-hidden[k]);
      if (!m.by_gate) hidden[k] *= coefficients[k];
    }
#pragma omp barrier
#pragma omp single
    kept = choose(m, hidden, index);
    if (m.by_gate) {
      dot_dispatch(m.up, index, up_x, kept * i / n, kept * (i + 1) / n, coefficients);
      for (int64_t k = kept * i / n; k < kept * (i + 1) / n; ++k)
        hidden[index[k]] *= coefficients[k];
    }
#pragma omp barrier
    sum_dispatch(m.down, hidden, index, kept, y, nullptr, sums, coefficients);
  }
  return kept;
}

}  // namespace
}  // namespace gossamer
