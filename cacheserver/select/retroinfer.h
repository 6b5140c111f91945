// retroinfer: the best clusters exactly, the next many by their centroids, the rest not at all.
//
// Source: RetroInfer (arXiv 2505.02922), the wave index: k-means on centred directions, one cluster
// per 16 tokens inside segments of 8,192, ranked by the group's summed softmax of q . centroid.
// Retrieval zone: whole clusters while they fit the budget of 16 * max_pages tokens (1.8 % of the
// clusters in the original). Estimation zone: the next 23.2 % of the clusters, each as one key of
// its size with its mean value; a lower bound of their mass. The original keeps up to 1,024
// generated tokens exact outside any budget; here they join the nearest cluster. Keeps 4 bytes a
// token and 8 * head_dim a cluster (about 70 bytes a token at 128). Bad at: heads whose mass is
// outside both zones, tokens unlike their cluster, drift between builds. residual = false: neither
// zone, plain pages.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeRetroInfer(const PolicyOptions& options);

}  // namespace icecache
