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

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);  // REQUIRES: options.Validate().ok()

  // Greedy: the largest logit, the lowest id among equals; draws no random number. NaN logits lose.
  // REQUIRES: logits not empty. Cost: one pass, plus a sort of the likely tokens when top_p < 1.
  int32_t Sample(std::span<const float> logits);

 private:
  double NextUniform();  // [0, 1)

  const SamplerOptions options_;
  uint64_t state_;
  std::vector<std::pair<double, int32_t>> candidates_;  // (probability weight, id), reused
};

}  // namespace icecache
