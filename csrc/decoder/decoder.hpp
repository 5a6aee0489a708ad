// One step of greedy decoding for a Llama-style transformer, batch 1, all of it compiled.
//
// The whole step runs inside one parallel region: between two matrix products there is a barrier
// instead of a return to Python. Activations, sums and the key-value cache are float32.
#pragma once
#include <cstdint>

#include "bitmap/bitmap.hpp"
#include "nm/nm.hpp"
#include "quantized/quantized.hpp"

namespace gossamer {

// A linear layer: dense rows, or a bitmap and its kept values, float32 or bfloat16; or quantised;
// or N:M.
struct Linear {
  Bitmap packed{};               // for a dense layer: values, rows and bf16 only
  int64_t cols = 0;
  const float* bias = nullptr;
  bool dense = true;
  const Quantized* quantized = nullptr;  // then nothing above but cols, bias and packed.rows counts
  const Nm* nm = nullptr;  // the same
  bool apart() const { return quantized || nm; }  // its kernels are compiled apart
};

struct Layer {
  const float* input_norm = nullptr;
  const float* mlp_norm = nullptr;
  Linear q, k, v, o, gate, up, down;
  float* keys = nullptr;  // (kv_heads, capacity, head_dim)
  float* values = nullptr;  // the same
};

struct Llama {
  int64_t hidden, heads, kv_heads, head_dim, inner, vocab, capacity;
  float eps, scale;
  const void* embedding = nullptr;  // (vocab, hidden)
  bool embedding_bf16 = false;
  const float* cosines = nullptr;  // (capacity, head_dim)
  const float* sines = nullptr;
  const float* final_norm = nullptr;
  Linear head;
  const Layer* layers = nullptr;
  int64_t layer_count = 0;
  // Scratch, each on a 64-byte boundary and padded with zeros to a multiple of 512 floats, the
  // longest span of an N:M row.
  float *state, *normed, *query, *key, *mixed, *gated, *scores, *sums, *more_sums;
  // For layers whose kernels are compiled apart.
  int64_t most_rows = 0;  // of any layer; sums and more_sums hold 2 more per thread
  int8_t* integers = nullptr;
  float *integer_scales, *integer_sums;
  decltype(QuantizedKernels::quantize_input) quantize = nullptr;
  decltype(QuantizedKernels::rows) quantized_rows = nullptr;
  decltype(NmKernels::rows) nm_rows = nullptr;
};

struct DecoderKernels {
  // Appends `token` at `position` (positions before it are in the cache), writes logits (vocab,).
  void (*step)(const Llama&, int64_t token, int64_t position, float* logits, int threads);
};

template <>
const DecoderKernels Tables<DecoderKernels>::portable;
template <>
const DecoderKernels Tables<DecoderKernels>::avx2;
template <>
const DecoderKernels Tables<DecoderKernels>::avx512;

}  // namespace gossamer
