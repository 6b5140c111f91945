// pqcache: tokens by product-quantised keys.
//
// Source: PQCache (SIGMOD 2025, arXiv 2407.12820): each key is cut into 2 sub-vectors, each of them
// a code of 6 bits from k-means over the build's keys (Euclidean). A query makes one table of 2 x
// 64 dot products; a token's logit is the sum of two entries. Softmax is summed over the group, the
// best 16 * max_pages tokens are fetched. New tokens are coded with the old centroids, as in the
// original. Keeps 2 bytes a token and 256 * head_dim for the tables. Bad at: telling apart the
// tokens of one cell (64 per half of the key); drift: centroids learnt at the prompt say less and
// less about what follows.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakePqCache(const PolicyOptions& options);

}  // namespace icecache
