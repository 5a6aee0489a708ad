// Bindings of attention over chosen pairs. Python has checked the lists of a layout; the lists for
// decoding, which are new at every step, are checked here.
#include "attention/bindings.hpp"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/arguments.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// A checked task with the arrays it reads; see attention.hpp.
class Attention {
 public:
  Attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets,
            const Tensor& blocks, const Maybe& tiles, const Maybe& masks,
            const Maybe& token_offsets, const Maybe& tokens, const Maybe& block_bias,
            const Maybe& key_bias, const Maybe& query_positions, const Maybe& key_positions,
            int64_t rows, int64_t columns, int64_t group, bool causal, float scale)
      : blocks_(blocks.count()) {
    for (const Tensor* x : {&query, &key, &value, &offsets, &blocks}) owners_.push_back(x->owner());
    for (const Maybe* x : {&tiles, &masks, &token_offsets, &tokens, &block_bias, &key_bias,
                           &query_positions, &key_positions})
      if (*x) owners_.push_back((*x)->owner());
    AttentionTask& t = task_;
    take_inputs(query, key, value, t);
    if (rows < 1 || columns < 1 || group < 1 || (rows % group && group % rows))
      throw std::invalid_argument("attention: bad blocks");
    t.rows = rows, t.columns = columns, t.group = group, t.causal = causal, t.scale = scale;
    t.offsets = shared<const int64_t>("offsets", offsets, t.query_blocks() + 1, t.batch, t.heads);
    t.blocks = blocks.data<const int32_t>("blocks", {blocks_});
    if (t.entries() != blocks_) throw std::invalid_argument("attention: bad offsets");
    if (tiles) {
      t.tiles = tiles->data<const int32_t>("tiles", {blocks_});
      t.masks = masks.value().data<const uint8_t>("masks", {kAny, rows, 2 * t.block_panels()});
    }
    const int64_t groups = (t.queries + group - 1) / group;
    t.token_offsets =
        shared<const int64_t>("token offsets", token_offsets, groups + 1, t.batch, t.heads);
    if (tokens) t.tokens = tokens->data<const int32_t>("tokens", {tokens->count()});
    if (block_bias) t.block_bias = block_bias->data<const float>("block bias", {blocks_});
    t.key_bias = shared<const float>("key bias", key_bias, t.keys, t.batch, t.heads);
    if (!causal) return;
    t.query_positions = shared<const int32_t>("query positions", query_positions.value(), t.queries,
                                              t.batch, t.heads);
    t.key_positions =
        shared<const int32_t>("key positions", key_positions.value(), t.keys, t.batch, t.heads);
  }

  void forward(const Tensor& output, const Tensor& lse, int threads, int isa) const {
    const AttentionTask& t = task_;
    void* to = output.floats("output", {t.batch, t.heads, t.queries, t.value_width});
    float* sums = lse.data<float>("lse", {t.batch, t.heads, t.queries});
    if (output.is_bf16() != t.bf16 || threads < 1)
      throw std::invalid_argument("attention: bad output");
#if defined(__x86_64__)
    if (t.bf16 && isa == kAvx512 && has_bf16()) return attention_bf16(t, to, sums, threads);
#endif
    kernels<AttentionKernels>(isa).forward(t, to, sums, threads);
  }

  void backward(const Tensor& grad, const Tensor& grad_lse, const Tensor& output,
                const Tensor& lse, const Tensor& grad_query, const Tensor& grad_key,
                const Tensor& grad_value, const Maybe& grad_block_bias, const Maybe& grad_key_bias,
                int threads, int isa) const {
    const AttentionTask& t = task_;
    AttentionGradients g{};
    g.grad = heads_of("grad", grad, {t.batch, t.heads, t.queries, t.value_width}, t.bf16);
    g.output = heads_of("output", output, {t.batch, t.heads, t.queries, t.value_width}, t.bf16);
    g.grad_lse = grad_lse.data<const float>("grad of lse", {t.batch, t.heads, t.queries});
    g.lse = lse.data<const float>("lse", {t.batch, t.heads, t.queries});
    g.query = grad_query.floats("grad of query", {t.batch, t.heads, t.queries, t.width});
    g.key = grad_key.floats("grad of key", {t.batch, t.kv_heads, t.keys, t.width});
    g.value = grad_value.floats("grad of value", {t.batch, t.kv_heads, t.keys, t.value_width});
    if (grad_query.is_bf16() != t.bf16 || grad_key.is_bf16() != t.bf16 ||
        grad_value.is_bf16() != t.bf16 || threads < 1)
      throw std::invalid_argument("attention: gradients of another type");
    if (t.block_bias)
      g.block_bias = grad_block_bias.value().data<float>("grad of block bias", {blocks_});
    if (t.key_bias.data)
      g.key_bias = grad_key_bias.value().data<float>(
          "grad of key bias", {t.key_bias.batches, t.key_bias.heads, t.keys});
#if defined(__x86_64__)
    if (t.bf16 && isa == kAvx512 && has_bf16()) return attention_bf16_backward(t, g, threads);
#endif
    kernels<AttentionKernels>(isa).backward(t, g, threads);
  }

 private:
  AttentionTask task_{};
  int64_t blocks_;
  std::vector<nb::object> owners_;
};

// The index as 32 bits. Raises where a page is out of range or named twice for one head.
std::vector<int32_t> checked_index(const int64_t* index, int64_t units, int64_t count,
                                   int64_t pages, int threads) {
  std::vector<int32_t> found(units * count);
  int64_t wrong = -1;  // the place of one
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint8_t> seen(pages);
#pragma omp for schedule(static) reduction(max : wrong)
    for (int64_t unit = 0; unit < units; ++unit) {
      std::fill(seen.begin(), seen.end(), 0);
      for (int64_t i = unit * count; i < (unit + 1) * count; ++i) {
        const int64_t page = index[i];
        found[i] = static_cast<int32_t>(page);
        if (page == -1) continue;
        if (page < 0 || page >= pages || seen[page]) wrong = i;
        else seen[page] = 1;
      }
    }
  }
  if (wrong < 0) return found;
  const std::string number = "index " + std::to_string(index[wrong]);
  if (index[wrong] >= 0 && index[wrong] < pages)
    throw std::invalid_argument(number + " occurs twice for one head of keys");
  throw std::invalid_argument(number + " is none of 0 to " + std::to_string(pages - 1) +
                              ", nor -1 for no page");
}

void decode(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& index,
            int64_t page, const Maybe& key_bias, const Maybe& query_positions,
            const Maybe& key_positions, bool causal, float scale, const Tensor& output,
            const Tensor& lse, int threads, int isa) {
  DecodeTask t{};
  take_inputs(query, key, value, t);
  if (page < 1 || threads < 1) throw std::invalid_argument("attention: bad page");
  t.causal = causal, t.scale = scale, t.page = page, t.count = index.size(2);
  const auto* list = index.data<const int64_t>("index", {t.batch, t.kv_heads, t.count});
  t.key_bias = shared<const float>("key bias", key_bias, t.keys, t.batch, t.heads);
  if (causal) {
    t.query_positions = shared<const int32_t>("query positions", query_positions.value(), t.queries,
                                              t.batch, t.heads);
    t.key_positions =
        shared<const int32_t>("key positions", key_positions.value(), t.keys, t.batch, t.heads);
  }
  const std::vector<int32_t> checked = checked_index(
      list, t.batch * t.kv_heads, t.count, (t.keys + page - 1) / page, threads);
  t.index = checked.data();
  void* to = output.floats("output", {t.batch, t.heads, t.queries, t.value_width});
  if (output.is_bf16() != t.bf16) throw std::invalid_argument("attention: bad output");
  float* sums = lse.data<float>("lse", {t.batch, t.heads, t.queries});
#if defined(__x86_64__)
  if (t.bf16 && isa == kAvx512 && has_bf16()) return attention_bf16_decode(t, to, sums, threads);
#endif
  kernels<AttentionKernels>(isa).decode(t, to, sums, threads);
}

}  // namespace

void bind_attention(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
                    const Maybe&, const Maybe&, const Maybe&, int64_t, int64_t, int64_t, bool,
                    float>())
      .def("forward", &Attention::forward, Unlocked())
      .def("backward", &Attention::backward, Unlocked());
  m.def("attention_decode", &decode, Unlocked());
}

}  // namespace gossamer
