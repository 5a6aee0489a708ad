// Compressed rows and blocks, AVX-512 path.
#include "blocks/blocks.hpp"
#include "csr/csr.hpp"

namespace gossamer {
namespace {
constexpr int kLanes = 16;  // floats in a register
constexpr int kVectors = 8;  // of 16 floats, in a batch tile of compressed rows
constexpr int kSums = 24;  // of 16 floats, in registers for the product with blocks
constexpr int kHeight = 8;  // of rows that have such sums
}
}  // namespace gossamer

#include "blocks/driver.hpp"
#include "csr/driver.hpp"

namespace gossamer {
void csr_linear_avx512(Csr m, Reordered other, const float* x, float* y, int64_t batch,
                      const float* bias, float* xt, float* yt, int threads) {
  run_csr_linear(m, other, x, y, batch, bias, xt, yt, threads);
}
void csr_sampled_avx512(const Csr& m, const float* x, const float* dy, float* grad,
                        int64_t batch, float* xt, float* yt, int threads) {
  run_csr_sampled(m, x, dy, grad, batch, xt, yt, threads);
}
void blocks_avx512(const Blocks& m, const float* x, float* y, int64_t batch, const float* bias,
                   float* xt, float* yt, int threads) {
  run_blocks(m, x, y, batch, bias, xt, yt, threads);
}
}  // namespace gossamer
