// Bindings of tiled keys and values. Python has checked bitmaps and offsets by tile_offsets.
#include "kv_tiles/bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "attention/arguments.hpp"
#include "kv_tiles/kv_tiles.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// (batch, heads, blocks of 64 tokens, tiles of a block); the width is the caller's.
TilesOf sizes(const Tensor& bitmaps, int64_t width, bool keys) {
  const TilesOf t{bitmaps.size(0), bitmaps.size(1), bitmaps.size(2), width, keys, false};
  if (width < 1 || bitmaps.size(3) != t.tiles())
    throw std::invalid_argument("kv_tiles: bitmaps of another width");
  return t;
}

uint64_t* words(const Tensor& bitmaps, const TilesOf& t) {
  return reinterpret_cast<uint64_t*>(
      bitmaps.data<int64_t>("bitmaps", {t.batch, t.heads, t.blocks, t.tiles()}));
}

Tiles tiles_of(const Tensor& bitmaps, const Tensor& offsets, const Tensor& values,
               const TilesOf& t) {
  const int64_t size = values.size(0);
  return {words(bitmaps, t),
          offsets.data<const int32_t>("offsets", {t.batch, t.heads, t.blocks, t.tiles()}),
          values.floats("values", {size}), size};
}

void mark(const Tensor& mask, const Tensor& bitmaps, bool keys, int threads, int isa) {
  const TilesOf t = sizes(bitmaps, mask.size(3), keys);
  const auto* kept = mask.data<const bool>("mask", {t.batch, t.heads, t.blocks * kTile, t.width});
  if (threads < 1) throw std::invalid_argument("kv_tiles: no threads");
  kernels<KvTilesKernels>(isa).mark(t, reinterpret_cast<const uint8_t*>(kept), words(bitmaps, t),
                                    threads);
}

// Where each tile's values begin, in steps of 8; returns how many values there are.
int64_t tile_offsets(const Tensor& bitmaps, const Tensor& offsets) {
  const int64_t count = bitmaps.count();
  const auto* words = bitmaps.data<const int64_t>("bitmaps", {count});
  auto* to = offsets.data<int32_t>("offsets", {count});
  int64_t steps = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (steps > INT32_MAX) throw std::invalid_argument("more tiles than 31 bits count");
    to[i] = static_cast<int32_t>(steps);
    steps += (__builtin_popcountll(static_cast<uint64_t>(words[i])) + kStep - 1) / kStep;
  }
  return steps * kStep;
}

void pack(const Tensor& x, const Tensor& bitmaps, const Tensor& offsets, const Tensor& values,
          bool keys, int threads, int isa) {
  TilesOf t = sizes(bitmaps, x.size(3), keys);
  t.bf16 = x.is_bf16();
  const Heads from = heads_of("x", x, {t.batch, t.heads, t.blocks * kTile, t.width}, t.bf16);
  const Tiles to = tiles_of(bitmaps, offsets, values, t);
  if (values.is_bf16() != t.bf16 || threads < 1) throw std::invalid_argument("kv_tiles: bad pack");
  kernels<KvTilesKernels>(isa).pack(t, from, to.bitmaps, to.offsets, const_cast<void*>(to.values),
                                    threads);
}

void unpack(const Tensor& bitmaps, const Tensor& offsets, const Tensor& values, const Tensor& x,
            bool keys, int threads, int isa) {
  TilesOf t = sizes(bitmaps, x.size(3), keys);
  t.bf16 = x.is_bf16();
  void* to = x.floats("x", {t.batch, t.heads, t.blocks * kTile, t.width});
  if (values.is_bf16() != t.bf16 || threads < 1)
    throw std::invalid_argument("kv_tiles: bad unpack");
  kernels<KvTilesKernels>(isa).unpack(t, tiles_of(bitmaps, offsets, values, t), to, threads);
}

// `parts` holds, of each part of the tokens, bitmaps, offsets and values of keys and then of values.
void decode(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::vector<Tensor>& parts, const Maybe& key_bias, bool causal, float scale,
            const Tensor& output, const Tensor& lse, int threads, int isa) {
  TiledTask t{};
  take_inputs(query, key, value, t);
  if (parts.size() % 6 || threads < 1) throw std::invalid_argument("kv_tiles: bad parts");
  if (causal && t.queries > t.keys)
    throw std::invalid_argument("kv_tiles: more queries than dense keys");
  std::vector<TiledTokens> tokens;
  int64_t all = t.keys;
  for (size_t i = 0; i < parts.size(); i += 6) {
    const Tensor* part = &parts[i];
    const TilesOf keys = sizes(part[0], t.width, true), values = sizes(part[3], t.value_width, false);
    const bool fits = keys.batch == t.batch && keys.heads == t.kv_heads &&
                      values.batch == t.batch && values.heads == t.kv_heads &&
                      values.blocks == keys.blocks && part[2].is_bf16() == t.bf16 &&
                      part[5].is_bf16() == t.bf16;
    if (!fits) throw std::invalid_argument("kv_tiles: tiles do not fit the queries");
    tokens.push_back({tiles_of(part[0], part[1], part[2], keys),
                      tiles_of(part[3], part[4], part[5], values), keys.blocks});
    all += keys.blocks * kTile;
  }
  t.parts = tokens.data(), t.count = static_cast<int64_t>(tokens.size());
  t.causal = causal, t.scale = scale;
  t.key_bias = shared<const float>("key bias", key_bias, all, t.batch, t.heads);
  void* to = output.floats("output", {t.batch, t.heads, t.queries, t.value_width});
  if (output.is_bf16() != t.bf16) throw std::invalid_argument("kv_tiles: bad output");
  float* sums = lse.data<float>("lse", {t.batch, t.heads, t.queries});
#if defined(__x86_64__)
  if (t.bf16 && isa == kAvx512 && has_vbmi2()) return decode_tiles_bf16(t, to, sums, threads);
#endif
  kernels<KvTilesKernels>(isa).decode(t, to, sums, threads);
}

}  // namespace

void bind_kv_tiles(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("kv_tiles_mark", &mark, Unlocked());
  m.def("kv_tiles_offsets", &tile_offsets, Unlocked());
  m.def("kv_tiles_pack", &pack, Unlocked());
  m.def("kv_tiles_unpack", &unpack, Unlocked());
  m.def("kv_tiles_decode", &decode, Unlocked());
}

}  // namespace gossamer
