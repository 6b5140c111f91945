// omnikv: the tokens that some head of the group attends to most, by exact attention of a filter
// layer.
//
// Source: OmniKV (ICLR 2025): a few filter layers score every token exactly, the layers behind them
// use the same tokens. One slice is one layer, so this policy is what happens in a filter layer
// (largest softmax weight over the group's heads); LayerReuse (layer_reuse.h) gives its choice to
// the others. Budget: 16 * max_pages tokens. A filter layer reads all of its keys (not counted in
// tokens_read: the original has them on the device). Keeps nothing. Bad at: layers unlike their
// filter layer.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

std::unique_ptr<SelectionPolicy> MakeOmniKv(const PolicyOptions& options);

}  // namespace icecache
