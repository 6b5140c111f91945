// ObservedAttention: what the queries before a build paid attention to. Shared by the policies that
// keep tokens by it (H2O, SnapKV, InfLLM).
//
// Select changes nothing (a sealed slice is shared by all readers), so attention during decoding is
// not observed: statistics are those of the build, and come anew with every re-clustering
// (docs/adr/0006). Without BuildHints::queries all scores are 0.
#pragma once

#include <span>
#include <vector>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

// score[token] = softmax weight over all rows, mean over the last `queries_max` query groups and
// their heads; the sum over tokens is 1. Cost: that many passes over K.
std::vector<float> ObserveAttention(const TokenRows& rows, const BuildHints& hints,
                                    uint32_t queries_max);

}  // namespace icecache
