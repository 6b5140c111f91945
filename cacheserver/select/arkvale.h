// arkvale: pages by the corner of a box of mean width.
//
// Source: ArkVale (NeurIPS 2024), "cuboid, mean": the centre c of the page's bounding box and per
// dimension the mean distance r of its keys from c. Score = q . c + |q| . r: Quest's corner of a
// smaller box, which ranks pages much better. Budget: max_pages pages. Keeps 8 * head_dim bytes a
// page in f32. The original ranks pages for all heads of a layer together and keeps a pool of
// recalled pages on the device; here a kv head has its own ranking, and the pool is the worker's
// page cache. Bad at: pages whose keys lie on different sides of the box: one of them may be what
// is asked for.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeArkVale(const PolicyOptions& options);

}  // namespace icecache
