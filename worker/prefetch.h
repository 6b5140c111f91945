// Prefetch: when an answer to the queries of the step before will do for those of this one.
//
// Queries of a head drift from token to token (mean cosine of neighbours about 0.84, FreeKV); pages
// chosen for the last ones serve the next, unless the head has turned to something else. Then, and
// only for that kv head, the question is asked again. Pages are attended to with the new queries in
// any case; what stays behind by a step is which pages, and the residual.
#pragma once

#include <cstdint>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"

namespace icecache {

// Smallest cosine of two queries of the same query head over one group, [group, dim] each. A query
// of zeros is like nothing but another one.
float SmallestCosine(const float* before, const float* now, uint32_t group, uint32_t dim);

// The kv heads of a layer whose queries [query_heads, head_dim] have moved: SmallestCosine below
// `min_cosine`.
std::vector<KvHeadId> MovedHeads(const ModelShape& shape, const float* before, const float* now,
                                 float min_cosine);

}  // namespace icecache
