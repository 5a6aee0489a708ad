// The compiled module. Arrays come as tensors (common/tensor.hpp): every binding checks their types
// and shapes, and what a matrix object holds stays alive with it.
#include <nanobind/nanobind.h>

#include "active/bindings.hpp"
#include "attention/bindings.hpp"
#include "bitmap/bindings.hpp"
#include "blocks/bindings.hpp"
#include "common/isa.hpp"
#include "conv/bindings.hpp"
#include "csr/bindings.hpp"
#include "decoder/bindings.hpp"
#include "kv_tiles/bindings.hpp"
#include "limits/bindings.hpp"
#include "nm/bindings.hpp"
#include "quantized/bindings.hpp"
#include "sell/bindings.hpp"
#include "spgemm/bindings.hpp"
#include "statistics/bindings.hpp"

using namespace gossamer;

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels; call them through gossamer.ops.";
  m.def("best_isa", &best_isa);
  m.def("has_bf16", &has_bf16);
  m.def("has_vnni", &has_vnni);
  bind_active(m);
  bind_attention(m);
  bind_bitmap(m);
  bind_blocks(m);
  bind_conv(m);
  bind_csr(m);
  bind_kv_tiles(m);
  bind_limits(m);
  bind_nm(m);
  bind_quantized(m);  // before the decoder, which takes all kinds of matrices
  bind_decoder(m);
  bind_sell(m);
  bind_spgemm(m);
  bind_statistics(m);
}
