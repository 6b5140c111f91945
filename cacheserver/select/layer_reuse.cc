#include "cacheserver/select/layer_reuse.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cacheserver/select/exact_pages.h"

namespace icecache {

LayerReuse::LayerReuse(std::vector<uint32_t> filter_layers)
    : filter_layers_(std::move(filter_layers)) {}

bool LayerReuse::IsFilter(uint32_t layer) const {
  return std::binary_search(filter_layers_.begin(), filter_layers_.end(), layer);
}

Status LayerReuse::Select(uint32_t layer, const SelectionPolicy& policy,
                          const SelectRequest& request, const PagedKv& kv, Selection* out) {
  if (IsFilter(layer)) {
    policy.Select(request, kv, out);
    Selection pages;
    if (out->pages.empty()) {  // a policy of tokens: the layers behind need its pages
      SelectRequest plain = request;
      plain.residual = false;
      policy.Select(plain, kv, &pages);
    }
    pages_.clear();
    for (const SelectedPage& page : out->pages.empty() ? pages.pages : out->pages)
      pages_.push_back(page.page);
    chosen_ = true;
    return OkStatus();
  }
  if (!chosen_)
    return FailedPrecondition("layer " + std::to_string(layer) +
                              " reuses a filter layer's pages, and none was asked before it");
  out->pages.clear();
  out->residual.Reset(request.group, kv.head_dim);
  out->covered_mass = 0;  // this layer's mass elsewhere is not looked at
  std::vector<PageId> known;
  for (const PageId page : pages_) {
    if (known.size() == request.max_pages) break;
    if (page.value < kv.page_count && kv.pages[page.value].k != nullptr) known.push_back(page);
  }
  ExactPages exact;
  exact.Score(request, kv, known);
  for (uint32_t i = 0; i < known.size(); ++i)
    out->pages.push_back({known[i], LargestLogMass(exact.scores(), i)});
  out->tokens_read = exact.tokens_read();
  return OkStatus();
}

}  // namespace icecache
