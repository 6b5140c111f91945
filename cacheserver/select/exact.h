// exact: the oracle behind the seam. Reads every token in memory on every Select.
//
// Pages are in order of arrival. Select ranks pages by their exact softmax mass (or best token) and
// the residual is exact attention over all other pages, so pages + residual = full attention.
// read_cap is ignored: it reads everything, which is its purpose. Pages that are not in memory
// cannot be read and are left out of both.
//
// Cost: one scan of K per Select plus one of V for the residual; 1/16 byte of index per token.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeExact(const PolicyOptions& options);

}  // namespace icecache
