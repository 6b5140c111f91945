// streaming_llm: the most recent tokens, whatever is asked.
//
// Source: StreamingLLM (arXiv 2309.17453): sinks and a sliding window, the rest is evicted. Sinks
// are the worker's here, and so is the window's newest part; the policy prolongs the window by its
// budget of 16 * max_pages tokens. Positions stay true (the original renumbers them). Keeps
// nothing, costs nothing. Bad at: every question about the past; the lower bound of all others.
// covered_mass counts tokens, it does not know their mass.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeStreamingLlm(const PolicyOptions& options);

}  // namespace icecache
