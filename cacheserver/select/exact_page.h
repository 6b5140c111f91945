// exact_page: the oracle of pages. The best pages in order of arrival by exact attention, nothing
// else: what any policy over sequential pages could reach at the same budget.
//
// Source: the page oracle of ArkVale's and Quest's analyses (NeurIPS 2024; arXiv 2406.10774).
// Budget: max_pages pages. Scores every key in memory (tokens_read counts what it answers with
// only); keeps nothing. Bad at: what sequential pages are bad at, single tokens far apart.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeExactPage(const PolicyOptions& options);

}  // namespace icecache
