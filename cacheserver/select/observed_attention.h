// ObservedAttention: what the queries before a build paid attention to. Shared by the policies that
// keep tokens by it (H2O, SnapKV, InfLLM).
//
// Select changes nothing (a sealed slice is shared by all readers), so attention during decoding is
// not observed: statistics are those of the build, and come anew with every re-clustering
// (docs/adr/0006). Without BuildHints::queries all scores are 0.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/selection_policy.h"

namespace icecache {

// score[token] = softmax weight over all rows, mean over the last `queries_max` query groups and
// their heads; the sum over tokens is 1. Cost: that many passes over K.
std::vector<float> ObserveAttention(const TokenRows& rows, const BuildHints& hints,
                                    uint32_t queries_max);

// An ArrivalPolicy whose record of a token is the attention it got from the last 32 query groups
// before the build, as one float; 0 for tokens that came later.
class ObservedTokens : public ArrivalPolicy {
 protected:
  ObservedTokens(PolicyKind kind, const PolicyOptions& options);

 private:
  void Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) final;
  std::string Wrong() const final;
};

}  // namespace icecache
