// quest: pages by an upper bound of their best token's logit.
//
// Source: Quest (arXiv 2406.10774). Per page the smallest and largest value of every key dimension;
// U = sum_i max(q_i min_i, q_i max_i) bounds q . k for every key of the page. With q split in its
// positive and negative part U is one dot product of twice the width, which is how it is computed.
// Budget: max_pages pages; heads of a group share one set (the original has one per head). Keeps 8
// * head_dim bytes a page in f32 (half that in the original). Bad at: wide boxes. Under RoPE the
// fast dimensions sweep their range inside every page, and the bound says little.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeQuest(const PolicyOptions& options);

}  // namespace icecache
