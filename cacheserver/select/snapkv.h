// snapkv: the tokens that the prompt's last queries looked at, chosen once at its end.
//
// Source: SnapKV (arXiv 2404.14469): attention of an observation window (here the last 32 query
// groups before the build), mean over window and group, max-pooled over 7 neighbouring tokens so
// that what surrounds a hit is kept too. Budget: 16 * max_pages tokens. The original keeps every
// generated token on top of its budget; here they count: the newest ones take up to half of it.
// Keeps 4 bytes a token; the build reads K once per query group. Bad at: a question that the
// prompt's end did not ask (nothing evicted returns), long generation.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeSnapKv(const PolicyOptions& options);

}  // namespace icecache
