// What bindings of attention take: queries, keys and values, and what heads share.
#pragma once
#include <optional>
#include <stdexcept>
#include <string>

#include "attention/attention.hpp"
#include "common/isa.hpp"
#include "common/tensor.hpp"

namespace gossamer {

using Maybe = std::optional<Tensor>;

inline Heads heads_of(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                      bool bf16) {
  int64_t strides[3];
  const void* data = x.heads(name, shape, strides);
  if (x.is_bf16() != bf16) throw std::invalid_argument("attention: arrays of different types");
  return {data, strides[0], strides[1], strides[2]};
}

// (batches, heads, width): batches 1 or all, heads a divisor of all.
template <class T>
Shared<T> shared(const char* name, const Maybe& x, int64_t width, int64_t batch, int64_t all) {
  if (!x) return {};
  Shared<T> found{nullptr, x->size(0), x->size(1), width};
  found.data = x->data<T>(name, {found.batches, found.heads, width});
  const bool batches = found.batches == 1 || (found.batches == batch && batch);
  if (!batches || found.heads < 1 || all % found.heads)
    throw std::invalid_argument(std::string("attention: ") + name + " does not fit the heads");
  return found;
}

// The sizes that forward, backward and decoding share.
template <class Task>
void take_inputs(const Tensor& query, const Tensor& key, const Tensor& value, Task& t) {
  t.batch = query.size(0), t.heads = query.size(1), t.queries = query.size(2);
  t.width = query.size(3), t.kv_heads = key.size(1), t.keys = key.size(2);
  t.value_width = value.size(3), t.bf16 = query.is_bf16();
  if (t.kv_heads < 1 || t.heads % t.kv_heads)
    throw std::invalid_argument("attention: heads are no multiple of the heads of keys");
  t.query = heads_of("query", query, {t.batch, t.heads, t.queries, t.width}, t.bf16);
  t.key = heads_of("key", key, {t.batch, t.kv_heads, t.keys, t.width}, t.bf16);
  t.value = heads_of("value", value, {t.batch, t.kv_heads, t.keys, t.value_width}, t.bf16);
}

}  // namespace gossamer
