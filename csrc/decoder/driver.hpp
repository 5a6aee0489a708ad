// The decoding step, compiled once per instruction set on top of that set's row_dot.
#pragma once
#include <omp.h>

#include <cmath>
#include <cstring>

#include "bitmap/driver.hpp"
#include "decoder/decoder.hpp"

namespace gossamer {
namespace {

// exp by range reduction and a polynomial of degree 6 (relative error below 3e-7): unlike the C
// library's it vectorises.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n =
      static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f)));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      1.0f +
      r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.33333377e-3f +
                                                                            r * 1.38888892e-3f)))));
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float dense_dot(const float* w, const float* x, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += w[j] * x[j];
  return sum;
}

inline float dense_dot(const uint16_t* w, const float* x, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += widen(w[j]) * x[j];
  return sum;
}

template <class T>
float row_product(const Linear& m, int64_t r, const float* x) {
  const T* values = static_cast<const T*>(m.packed.values);
  if (m.dense) return dense_dot(values + r * m.cols, x, m.cols);
  float sum;
  one_row<T, 1>(m.packed, r, x, 0, &sum);
  return sum;
}

// Share i of n of the rows: by kept weights where packed, else by rows.
inline int64_t first_row(const Linear& m, int i, int n) {
  if (m.nm) return m.packed.rows * i / n;
  if (m.quantized) return i == n ? m.packed.rows : m.packed.rows * i / n & ~int64_t{1};
  return m.dense ? m.packed.rows * i / n : split_rows(m.packed, i, n);
}

// Row a of m and row b of n times x plus their biases, into out[0] and out[1].
inline void two_products(const Linear& m, int64_t a, const Linear& n, int64_t b, const float* x,
                         float* out) {
  const bool alike = !m.dense && !n.dense && m.packed.bf16 == n.packed.bf16;
  if (alike && m.packed.bf16) two_rows<uint16_t>(m.packed, a, n.packed, b, x, out);
  else if (alike) two_rows<float>(m.packed, a, n.packed, b, x, out);
  else {
    out[0] = m.packed.bf16 ? row_product<uint16_t>(m, a, x) : row_product<float>(m, a, x);
    out[1] = n.packed.bf16 ? row_product<uint16_t>(n, b, x) : row_product<float>(n, b, x);
  }
  if (m.bias) out[0] += m.bias[a];
  if (n.bias) out[1] += n.bias[b];
}

// x as the quantised layer's kernels want it; every thread must come here.
inline QuantInput as_integers(const Llama& m, const Linear& layer, const float* x) {
  if (layer.quantized) {
    const int64_t pairs = pairs_of(layer.quantized->words);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < pairs; ++b)
      m.quantize(x, layer.cols, b, b + 1, m.integers, m.integer_scales, m.integer_sums);
  }
  return {x, m.integers, m.integer_scales, m.integer_sums};
}

// The rows from..to of a layer whose kernels are compiled apart, into a part of `memory` that is
// thread i's alone, since threads are not at the same layer at the same time; row r is at [r].
inline float* sums_apart(const Llama& m, const Linear& layer, const QuantInput& input, int64_t from,
                         int64_t to, int i, int n, float* memory) {
  float* own = memory + m.most_rows * i / n + 2 * i - from;
  if (layer.nm) m.nm_rows(*layer.nm, input.exact, from, to, own);
  else m.quantized_rows(*layer.quantized, input, from, to, own);
  return own;
}

// done(r, row r of the matrix times x, plus bias) for the rows of share i of n; `input` is x as
// integers, if the layer wants it so.
template <class F>
void product(const Llama& m, const Linear& layer, const float* x, const QuantInput& input, int i,
             int n, F done) {
  const int64_t from = first_row(layer, i, n), to = first_row(layer, i + 1, n);
  if (layer.apart()) {
    const float* sums = sums_apart(m, layer, input, from, to, i, n, m.sums);
    for (int64_t r = from; r < to; ++r) done(r, sums[r] + (layer.bias ? layer.bias[r] : 0.0f));
    return;
  }
  const int64_t half = (to - from) / 2;
  float sums[2];
  for (int64_t r = from; r < from + half; ++r) {
    two_products(layer, r, layer, r + half, x, sums);
    done(r, sums[0]);
    done(r + half, sums[1]);
  }
  if ((to - from) % 2) {
    two_products(layer, to - 1, layer, to - 1, x, sums);
    done(to - 1, sums[0]);
  }
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float scale = 1.0f / std::sqrt(dense_dot(x, x, n) / static_cast<float>(n) + eps);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = weight[j] * (x[j] * scale);
}

// x (head_dim,) turned by the position's angles; halves are paired, as in Hugging Face's Llama.
inline void rotate(const float* x, const float* cosine, const float* sine, int64_t n, float* y) {
  const int64_t half = n / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    y[j] = a * cosine[j] - b * sine[j];
    y[j + half] = b * cosine[j + half] + a * sine[j + half];
  }
}

// Head h of the attention over positions 0..position, into out (head_dim,).
inline void attend(const Llama& m, const Layer& layer, int64_t h, int64_t position, float* out) {
  const int64_t d = m.head_dim, shared = h / (m.heads / m.kv_heads);
  const float* keys = layer.keys + shared * m.capacity * d;
  const float* values = layer.values + shared * m.capacity * d;
  float* scores = m.scores + h * m.capacity;
  float query[512];
  rotate(m.query + h * d, m.cosines + position * d, m.sines + position * d, d, query);
  float top = -INFINITY, total = 0.0f;
  for (int64_t t = 0; t <= position; ++t) {
    scores[t] = dense_dot(keys + t * d, query, d) * m.scale;
    top = scores[t] > top ? scores[t] : top;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t <= position; ++t) {
    scores[t] = fast_exp(scores[t] - top);
    total += scores[t];
  }
  std::memset(out, 0, sizeof(float) * d);
  for (int64_t t = 0; t <= position; ++t) {
    const float share = scores[t] / total;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) out[j] += share * values[t * d + j];
  }
}

inline void attention(const Llama& m, const Layer& layer, int64_t position, int i, int n) {
  const int64_t d = m.head_dim;
  const Linear& asks = layer.q.quantized ? layer.q : layer.k.quantized ? layer.k : layer.v;
  const QuantInput normed = as_integers(m, asks, m.normed);
  product(m, layer.q, m.normed, normed, i, n, [&](int64_t r, float y) { m.query[r] = y; });
  product(m, layer.k, m.normed, normed, i, n, [&](int64_t r, float y) { m.key[r] = y; });
  product(m, layer.v, m.normed, normed, i, n, [&](int64_t r, float y) {
    layer.values[(r / d * m.capacity + position) * d + r % d] = y;
  });
#pragma omp barrier
  for (int64_t h = m.kv_heads * i / n; h < m.kv_heads * (i + 1) / n; ++h)
    rotate(m.key + h * d, m.cosines + position * d, m.sines + position * d, d,
           layer.keys + (h * m.capacity + position) * d);
#pragma omp barrier
  for (int64_t h = m.heads * i / n; h < m.heads * (i + 1) / n; ++h)
    attend(m, layer, h, position, m.mixed + h * d);
#pragma omp barrier
  const QuantInput mixed = as_integers(m, layer.o, m.mixed);
  product(m, layer.o, m.mixed, mixed, i, n, [&](int64_t r, float y) { m.state[r] += y; });
#pragma omp barrier
}

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

// Rows of gate and up are split alike, so that one thread has both halves of an element.
inline void mlp(const Llama& m, const Layer& layer, int i, int n) {
  const QuantInput normed = as_integers(m, layer.gate.quantized ? layer.gate : layer.up, m.normed);
  const int64_t from = first_row(layer.gate, i, n), to = first_row(layer.gate, i + 1, n);
  if (layer.gate.quantized && layer.up.quantized) {
    const float* gates = sums_apart(m, layer.gate, normed, from, to, i, n, m.sums);
    const float* ups = sums_apart(m, layer.up, normed, from, to, i, n, m.more_sums);
    for (int64_t r = from; r < to; ++r) {
      const float gate = gates[r] + (layer.gate.bias ? layer.gate.bias[r] : 0.0f);
      const float up = ups[r] + (layer.up.bias ? layer.up.bias[r] : 0.0f);
      m.gated[r] = silu(gate) * up;
    }
  } else if (!layer.gate.apart() && !layer.up.apart()) {
    for (int64_t r = from; r < to; ++r) {
      float both[2];
      two_products(layer.gate, r, layer.up, r, m.normed, both);
      m.gated[r] = silu(both[0]) * both[1];
    }
  } else {  // kinds that differ are split differently
    product(m, layer.gate, m.normed, normed, i, n,
            [&](int64_t r, float y) { m.gated[r] = silu(y); });
#pragma omp barrier
    product(m, layer.up, m.normed, normed, i, n, [&](int64_t r, float y) { m.gated[r] *= y; });
  }
#pragma omp barrier
  const QuantInput gated = as_integers(m, layer.down, m.gated);
  product(m, layer.down, m.gated, gated, i, n, [&](int64_t r, float y) { m.state[r] += y; });
#pragma omp barrier
}

inline void embed(const Llama& m, int64_t token) {
  const int64_t n = m.hidden;
  for (int64_t j = 0; j < n; ++j)
    m.state[j] = m.embedding_bf16 ? widen(static_cast<const uint16_t*>(m.embedding)[token * n + j])
                                  : static_cast<const float*>(m.embedding)[token * n + j];
}

inline void run_decode(const Llama& m, int64_t token, int64_t position, float* logits,
                       int threads) {
  embed(m, token);
#pragma omp parallel num_threads(threads)
  {
    const int i = omp_get_thread_num(), n = omp_get_num_threads();
    for (int64_t k = 0; k < m.layer_count; ++k) {
      const Layer& layer = m.layers[k];
#pragma omp single
      rms_norm(m.state, layer.input_norm, m.eps, m.hidden, m.normed);
      attention(m, layer, position, i, n);
#pragma omp single
      rms_norm(m.state, layer.mlp_norm, m.eps, m.hidden, m.normed);
      mlp(m, layer, i, n);
    }
#pragma omp single
    rms_norm(m.state, m.final_norm, m.eps, m.hidden, m.normed);
    const QuantInput normed = as_integers(m, m.head, m.normed);
    product(m, m.head, m.normed, normed, i, n, [&](int64_t r, float y) { logits[r] = y; });
  }
}

}  // namespace
}  // namespace gossamer
