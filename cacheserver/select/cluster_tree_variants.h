// The ablations of ClusterTree: the same code with one of its ideas taken away.
//
//   random_pages               pages of random tokens: what is left without any layout
//   sequential_pages           pages in order of arrival: is it the clustering? (the referees'
//   question) cluster_tree_no_residual   what is in no returned page is left out
//   cluster_tree_no_rerank     pages ranked by their summaries; only returned pages are read
//   exactly
//
// random_pages and sequential_pages keep summaries, sketches, re-ranking and residual; only a
// build's layout differs. Tokens inserted later go to the nearest page, as in cluster_tree. Costs:
// those of cluster_tree. Budget: max_pages pages.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeRandomPages(const PolicyOptions& options);
std::unique_ptr<SelectionPolicy> MakeSequentialPages(const PolicyOptions& options);
std::unique_ptr<SelectionPolicy> MakeTreeNoResidual(const PolicyOptions& options);
std::unique_ptr<SelectionPolicy> MakeTreeNoRerank(const PolicyOptions& options);

}  // namespace icecache
