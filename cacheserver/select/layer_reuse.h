// LayerReuse: layers behind a filter layer use the pages that it chose.
//
// Source: OmniKV (ICLR 2025) and IceCache's reuse variant: neighbouring layers attend to much the
// same tokens, so one selection serves several layers. Wraps the policies of one kv head's layers;
// one object per sequence and head, one thread, since it remembers the last filter layer's choice
// (which is why it is no SelectionPolicy: a policy answers equal queries equally).
//
// Page ids carry over between layers only where pages are in order of arrival: the policies of
// arrival_policy.h, exact, sequential and sequential_pages. Of a policy of tokens, the layers
// behind get its pages (budget_choice.h). Cost: the layers behind read their own K of the pages
// only. Bad at: layers unlike their filter layer, and page layouts by content.
#pragma once

#include <cstdint>
#include <vector>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

class LayerReuse {
 public:
  // filter_layers: ascending; the first must be the first layer asked of a step.
  explicit LayerReuse(std::vector<uint32_t> filter_layers);

  bool IsFilter(uint32_t layer) const;

  // In a filter layer: what policy.Select answers. Behind one: its pages of this step, as far as
  // the slice has them, with this layer's masses and no residual. FAILED_PRECONDITION before the
  // first filter layer.
  Status Select(uint32_t layer, const SelectionPolicy& policy, const SelectRequest& request,
                const PagedKv& kv, Selection* out);

 private:
  const std::vector<uint32_t> filter_layers_;
  bool chosen_ = false;
  std::vector<PageId> pages_;
};

}  // namespace icecache
