// shadowkv: chunks of 8 tokens by their mean key, with outlier chunks always kept.
//
// Source: ShadowKV (arXiv 2410.21465): landmarks are the mean keys of chunks of 8; a chunk's score
// is the largest softmax weight over the group's heads. Chunks least like their landmark (smallest
// cosine of a key with it) are kept exact whatever is asked: 24 of them per 1,024 tokens of budget,
// counted in the budget here. Budget: 16 * max_pages tokens. The original rebuilds chosen keys from
// a rank-160 factor of all heads' keys before RoPE; keys are exact here, which flatters it. It
// keeps generated tokens dense outside its budget; here they are indexed. Keeps 4 * head_dim + 4
// bytes a chunk. Bad at: needles inside ordinary chunks, whose landmark hides them.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeShadowKv(const PolicyOptions& options);

}  // namespace icecache
