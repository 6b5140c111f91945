// The model families once more, in float64 and as plainly as their definitions read: one token at a
// time, one scalar loop per sum, complex numbers for RoPE. Shares no code with worker/model; the
// loader's logits are compared to these.
//
// Written from: Llama (arXiv 2302.13971, 2407.21783), RoPE (2104.09864), GQA (2305.13245), YaRN
// (2309.00071), Qwen2 (2407.10671: biases on q, k, v), Qwen3 (2505.09388: RMSNorm on q and k
// heads), Mistral (2310.06825).
#pragma once

#include <cstdint>
#include <vector>

#include "tests/models/tiny_model.h"

namespace icecache {

// How RoPE's angles are stretched; numbers as in the spec's rope_scaling, given again by the test
// so that parsing is checked too.
struct ReferenceScaling {
  enum class Kind { kNone, kLinear, kLlama3, kYarn } kind = Kind::kNone;
  double factor = 1, original = 0, low = 1, high = 4, beta_fast = 32, beta_slow = 1;
};

// Logits [tokens, vocab] of dense causal attention; token i is at position first + i.
std::vector<std::vector<double>> ReferenceLogits(const TinyModel& model,
                                                 const ReferenceScaling& scaling,
                                                 const std::vector<int32_t>& tokens,
                                                 uint32_t first);

}  // namespace icecache
