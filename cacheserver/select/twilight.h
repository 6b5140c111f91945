// twilight: any selector's generous choice, pruned to the tokens that hold a share of the mass.
//
// Source: Twilight (arXiv 2502.02770), here over Quest, its first pairing: pages by Quest's bound,
// 8 times the budget (the original: 8,192 tokens); weights of their tokens estimated from 4-bit
// keys (smallest value and step per token); the fewest tokens that reach the target. The target is
// the request's min_mass, or 0.85 when it names none; never more than 16 * max_pages tokens. Keeps
// 8 * head_dim bytes a page and head_dim / 2 + 8 a token. Bad at: what Quest leaves out of 8
// budgets; heads whose mass needs more than the budget get the cut, not the target.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeTwilight(const PolicyOptions& options);

}  // namespace icecache
