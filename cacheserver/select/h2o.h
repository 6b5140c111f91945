// h2o: heavy hitters and recent tokens, half of the budget each.
//
// Source: H2O (arXiv 2306.14048): tokens that gathered most attention so far, per head, and the
// most recent ones; what falls out is gone. Here the sums are over the last 32 query groups before
// the build, as later papers run it (a full attention matrix does not exist in a modern prefill),
// one sum per kv head. Decoding adds tokens to the recent half only: docs/adr/0006. Budget: 16 *
// max_pages tokens. Keeps 4 bytes a token; the build reads K once per query group seen. Bad at:
// what was not looked at before the build: a passkey asked for later.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeH2o(const PolicyOptions& options);

}  // namespace icecache
