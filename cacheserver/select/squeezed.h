// squeezed: tokens of the clusters with the largest estimated share of the softmax.
//
// Source: SqueezedAttention (arXiv 2411.09688): one cluster per 20 tokens in cosine space, a
// token's share estimated as exp(q . c) / sum_j n_j exp(q . c_j). The original keeps what is above
// one threshold, set once for all layers and heads from a calibration run, so that each head gets
// the budget it needs; under a fixed budget that is the ranking by share, and min_mass gives heads
// different budgets. Budget: 16 * max_pages tokens. Keeps 4 bytes a token and 4 * head_dim a
// cluster (about 30 bytes a token at 128). Bad at: the same as clusterkv, at a finer grain; its
// k-means is the costliest build here (10 passes instead of the original's 300, which are made
// offline).
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeSqueezed(const PolicyOptions& options);

}  // namespace icecache
