// Decoding with AVX-512's dot products of bfloat16. The other files' loops are those of float32,
// for what is left over.
#include "attention/avx512_math.hpp"

#define GOSSAMER_ATTENTION_PAIRS
#include "attention/decode.hpp"

namespace gossamer {

void attention_bf16_decode(const DecodeTask& t, void* output, float* lse, int threads) {
  decode_of(t, static_cast<uint16_t*>(output), lse, threads);
}

}  // namespace gossamer
