// QueryEnergy: the mean square of a slice's recent queries, per dimension, for BuildHints.
//
// Under RoPE the share of a pair's energy that each of its two dimensions has turns with the
// position, and what a text asks for drifts: an index that is clustered again must be told what
// queries look like now, not what they looked like when the document ended.
//
// A moving average over the last `memory` groups of queries. Costs head_dim multiply-adds per query
// head observed. A value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace icecache {

class QueryEnergy {
 public:
  explicit QueryEnergy(uint32_t memory = 256) : memory_(memory) {}

  // What is known from elsewhere, as if `memory` groups had been observed; empty: nothing.
  void Assign(std::span<const float> energy) {
    energy_.assign(energy.begin(), energy.end());
    seen_ = energy.empty() ? 0 : memory_;
  }

  // queries: [group, head_dim], the same head_dim in every call.
  void Observe(const float* queries, uint32_t group, uint32_t head_dim) {
    energy_.resize(head_dim, 0.0f);
    seen_ = std::min(seen_ + 1, memory_);
    const float share = 1.0f / static_cast<float>(seen_);
    const float each = share / static_cast<float>(group);
    for (float& e : energy_) e *= 1 - share;
    for (uint32_t g = 0; g < group; ++g) {
      const float* const q = queries + size_t{g} * head_dim;
      for (uint32_t j = 0; j < head_dim; ++j) energy_[j] += each * q[j] * q[j];
    }
  }

  // [head_dim]; empty while fewer than an eighth of `memory` groups have been seen: a few queries
  // say little about the next ones.
  std::span<const float> value() const {
    return seen_ * 8 < memory_ ? std::span<const float>() : std::span(energy_);
  }

 private:
  uint32_t memory_;
  uint32_t seen_ = 0;
  std::vector<float> energy_;
};

}  // namespace icecache
