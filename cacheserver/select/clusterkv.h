// clusterkv: whole clusters of like keys, the last one trimmed to the budget.
//
// Source: ClusterKV (arXiv 2412.03213): k-means in cosine space, one cluster per 80 tokens, ranked
// by q . centroid; tokens of the best clusters until the budget is full. Budget: 16 * max_pages
// tokens. The original adds four clusters after every 320 generated tokens; here new tokens join
// the nearest one until the next build. Keeps 4 bytes a token and 4 * head_dim a cluster (about 11
// bytes a token at 128). Bad at: fine distinctions: a cluster of 80 around one needle spends 80
// tokens on it; a small budget holds less than one cluster.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeClusterKv(const PolicyOptions& options);

}  // namespace icecache
