// infllm: blocks by a few representative tokens.
//
// Source: InfLLM (arXiv 2402.04617): the tokens of a block that got most attention stand for it; a
// block's score is the sum of their logits over the query heads; whole blocks are loaded. Here a
// block is 2 pages (the original's 128 tokens do not fit a budget of 64) with 4 representatives,
// chosen by the attention of the last 32 query groups before the build (docs/adr/0006), evenly
// spaced where none was seen. The original sums over all heads of a layer; here over the kv head's
// group. Budget: max_pages pages; the representatives' keys, an eighth of all, are read to choose
// and counted in tokens_read. Keeps 4 bytes a token. Bad at: tokens that nobody looked at yet: they
// do not speak for their block.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeInfLlm(const PolicyOptions& options);

}  // namespace icecache
