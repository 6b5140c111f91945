// landmark: pages by their mean key.
//
// Source: the training-free reading of Landmark Attention (arXiv 2305.16300), whose landmark token
// gates a block of others: without training, the mean of the block's keys stands for it. Score =
// log(fill) + q . mean. Budget: max_pages pages. Keeps 4 * head_dim bytes a page. Bad at: pages
// whose tokens differ: the mean hides the one that matters. `sequential` is the same with a
// residual and exact re-ranking.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeLandmark(const PolicyOptions& options);

}  // namespace icecache
