// exact_token: the oracle that papers call "top-k". The best tokens by exact attention, nothing
// else.
//
// Source: Gupta et al., "Memory-efficient Transformers via Top-k Attention" (arXiv 2106.06899). One
// set per kv head: tokens are ranked by their softmax weight summed over the group's heads. Budget:
// 16 * max_pages tokens (budget_choice.h). Scores every key in memory (tokens_read counts what it
// answers with only); keeps nothing. Bad at: heads that attend widely, whose mass is not in any few
// tokens.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeExactToken(const PolicyOptions& options);

}  // namespace icecache
