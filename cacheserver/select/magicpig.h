// magicpig: tokens sampled by locality-sensitive hashing, attention corrected for how likely each
// was.
//
// Source: MagicPIG (arXiv 2410.16179): 150 tables of 10 sign bits of Gaussian projections, keys
// centred by their mean. A head samples the tokens that collide with its query in two tables or
// more; a token at angle theta is sampled with u = 1 - (1 - p)^L - L p (1 - p)^(L - 1), p = (1 -
// theta / pi)^10, and its logit is corrected by -log u. Budget: 16 * max_pages tokens, counted over
// the union of the heads' samples: only the first L tables are used, L as large as the budget lets
// it be (the original's sample has the size that chance gives it). Keeps 300 bytes a token, and
// 6,000 * head_dim bytes of projections a slice; the build makes 1,500 dot products a token. Bad
// at: few needles in a small budget; its strength is aggregation over many tokens. residual =
// false: pages by the tokens sampled first.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeMagicPig(const PolicyOptions& options);

}  // namespace icecache
