// sequential: pages in order of arrival with mean keys and mean values; the baseline layout (Quest,
// ArkVale, ShadowKV use it) under our ranking and residual.
//
// Select estimates a page's mass as fill * exp(q . mean key), reads exactly the best max_pages plus
// as many pages as read_cap allows, and returns the best of those by exact mass. The residual is
// exact for pages read and mean-based for the rest. Pages not in memory keep their estimate.
//
// Bad at: pages whose tokens differ (the mean hides an outlier; no second moment is kept). Cost:
// one scan of page means; 8 * head_dim bytes a page.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeSequential(const PolicyOptions& options);

}  // namespace icecache
