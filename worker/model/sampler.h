// Sampler: from logits to the next token. Deterministic: the same options and logits give the same
// tokens on every machine, since random bits and their conversion are defined here and not by a
// library. One thread.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "common/status.h"

namespace icecache {

struct SamplerOptions {
  double temperature = 0;  // 0: greedy
  double top_p = 1;        // smallest set of tokens with at least this probability; 1: all
  uint64_t seed = 0;

  Status Validate() const;  // INVALID_ARGUMENT naming the option
};

// All that a choice depends on besides the logits: what the CPU and a GPU choose the same token by.
struct Draw {
  double temperature = 0;
  double top_p = 1;
  double uniform = 0;  // [0, 1); not used when temperature is 0
};

// The token that a draw chooses. Greedy (temperature 0): the largest logit, the lowest id among
// equals. NaN logits lose. REQUIRES: logits not empty. Cost: one pass, plus a sort of the likely
// tokens when top_p < 1. `scratch`: kept between calls to save allocations.
using Candidates = std::vector<std::pair<double, int32_t>>;  // (probability weight, id)
int32_t ChooseToken(std::span<const float> logits, const Draw& draw, Candidates* scratch);

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);  // REQUIRES: options.Validate().ok()

  // For the next token. Greedy: takes no random number.
  Draw Next();
  int32_t Sample(std::span<const float> logits) {
    return ChooseToken(logits, Next(), &candidates_);
  }

 private:
  double NextUniform();  // [0, 1)

  SamplerOptions options_;
  uint64_t state_;
  Candidates candidates_;
};

}  // namespace icecache
