// mass: the smallest set of tokens that holds a given share of the exact attention mass.
//
// Source: top-p attention as an oracle (Twilight, arXiv 2502.02770, section 3). The share is the
// request's min_mass, or 0.95 when it names none; never more than 16 * max_pages tokens. Says how
// many tokens a head needs at all: see tokens chosen per head class. Scores every key in memory
// (tokens_read counts what it answers with only); keeps nothing. Bad at: nothing but cost, it is
// the truth.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeMassOracle(const PolicyOptions& options);

}  // namespace icecache
