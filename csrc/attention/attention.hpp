// Attention over chosen pairs of queries and keys, as in FlashAttention: one online softmax per
// query over the tiles listed for its block.
//
// Keys go in panels of 16. Of each listed key block the panels are packed once per head of keys and
// used by every query head and block; single keys are gathered into panels for their group of
// queries, or read where they lie if the group is small. Logits are in powers of 2.
#pragma once
#include <cstdint>

#include "common/tables.hpp"

namespace gossamer {

constexpr int kPanel = 16;
constexpr int kChunk = 64;  // keys that meet a strip of queries at once
// Gradients of keys and values are summed in so many shares of the query blocks, whatever the
// number of threads, so that threads do not change the result.
constexpr int kGradientShares = 4;

// Four axes of float32 or bfloat16, the last of them contiguous.
struct Heads {
  const void* data;
  int64_t batch, head, row;  // distances in numbers
};

// What is given for each of `heads` groups of neighbouring heads, or for every batch at once.
template <class T>
struct Shared {
  T* data;
  int64_t batches, heads, width;
  T* at(int64_t batch, int64_t head, int64_t all_heads) const {
    const int64_t b = batches == 1 ? 0 : batch;
    return data + (b * heads + head * heads / all_heads) * width;
  }
};

struct AttentionTask {
  Heads query, key, value;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  bool bf16, causal;
  float scale;

  int64_t rows, columns, group;
  Shared<const int64_t> offsets;  // width: query blocks + 1
  const int32_t* blocks;
  const int32_t* tiles;  // null, or the place in `masks` of each entry, or -1
  const uint8_t* masks;  // (n, rows, 2 * panels of a block)
  Shared<const int64_t> token_offsets;  // data is null without tokens; width: groups + 1
  const int32_t* tokens;

  const float* block_bias;               // null, or of each entry
  Shared<const float> key_bias;          // data may be null
  Shared<const int32_t> query_positions, key_positions;  // where causal

  int64_t query_blocks() const { return (queries + rows - 1) / rows; }
  int64_t key_blocks() const { return (keys + columns - 1) / columns; }
  int64_t block_panels() const { return (columns + kPanel - 1) / kPanel; }
  int64_t entries() const { return offsets.data[offsets.batches * offsets.heads * offsets.width - 1]; }
};

struct AttentionGradients {
  Heads grad, output;     // of the output, which is of the inputs' type
  const float* grad_lse;  // (batch, heads, queries)
  const float* lse;
  void *query, *key, *value;  // contiguous, of the inputs' type
  float *block_bias, *key_bias;  // of the shapes in the task; null where that is
};

// One list of keys or pages for each batch and head of keys, for few queries.
struct DecodeTask {
  Heads query, key, value;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  bool bf16, causal;
  float scale;
  const int32_t* index;  // (batch, kv heads, count), -1 where there is none
  int64_t count, page;
  Shared<const float> key_bias;
  Shared<const int32_t> query_positions, key_positions;
};

struct AttentionKernels {
  // output (batch, heads, queries, value width), contiguous and of the inputs' type; lse float32.
  void (*forward)(const AttentionTask&, void* output, float* lse, int threads);
  void (*backward)(const AttentionTask&, const AttentionGradients&, int threads);
  void (*decode)(const DecodeTask&, void* output, float* lse, int threads);
};

template <>
const AttentionKernels Tables<AttentionKernels>::portable;
template <>
const AttentionKernels Tables<AttentionKernels>::avx2;
template <>
const AttentionKernels Tables<AttentionKernels>::avx512;

// With AVX-512's dot products of bfloat16, for bfloat16 only.
void attention_bf16(const AttentionTask&, void* output, float* lse, int threads);
void attention_bf16_backward(const AttentionTask&, const AttentionGradients&, int threads);
void attention_bf16_decode(const DecodeTask&, void* output, float* lse, int threads);

}  // namespace gossamer
