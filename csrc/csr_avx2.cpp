// Compressed rows, AVX2 path.
#include "csr.hpp"

namespace gossamer {
namespace {
constexpr int kVectors = 4;
}
}  // namespace gossamer

#include "csr_driver.hpp"

namespace gossamer {
void csr_linear_avx2(Csr m, Reordered other, const float* x, float* y, int64_t batch,
                    const float* bias, float* xt, float* yt, int threads) {
  run_csr_linear(m, other, x, y, batch, bias, xt, yt, threads);
}
void csr_sampled_avx2(const Csr& m, const float* x, const float* dy, float* grad,
                      int64_t batch, float* xt, float* yt, int threads) {
  run_csr_sampled(m, x, dy, grad, batch, xt, yt, threads);
}
}  // namespace gossamer
