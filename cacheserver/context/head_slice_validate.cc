// The slow side of HeadSlice: what it counts and whether its invariants hold.
#include <string>
#include <vector>

#include "cacheserver/context/head_slice.h"

namespace icecache {

uint64_t HeadSlice::kv_bytes() const {
  uint64_t bytes = table_->frame_bytes_held() + pending_.charged_bytes();
  if (sinks_) bytes += sinks_->charged_bytes();
  if (tail_) bytes += tail_->charged_bytes();
  return bytes;
}

uint64_t HeadSlice::index_bytes() const {
  double bytes = 0;
  if (policy_) {
    policy_->VisitCounters([&](std::string_view name, double value) {
      if (name == "index_bytes") bytes = value;
    });
  }
  return static_cast<uint64_t>(bytes);
}

void HeadSlice::VisitCounters(const SelectionPolicy::CounterVisitor& visit) const {
  if (policy_) policy_->VisitCounters(visit);
  visit("sink_tokens", sink_count());
  visit("indexed_tokens", static_cast<double>(indexed_count()));
  visit("pending_tokens", pending_count());
  visit("tail_tokens", end() - next_append_);
  visit("kv_bytes", static_cast<double>(kv_bytes()));
  visit("inserts_since_build", static_cast<double>(inserts_since_build_));
}

Status HeadSlice::Validate() const {
  const uint32_t index_first = options_.first_position + sink_count();
  if (!index_loaded_) return OkStatus();  // AdoptIndex checks
  const uint64_t expected = uint64_t{next_append_} - pending_.count() - index_first;
  if (table_->token_count() != expected) {
    return Internal("slice: positions [" + std::to_string(index_first) + ", " +
                    std::to_string(next_append_ - pending_.count()) +
                    ") should be indexed, pages hold " + std::to_string(table_->token_count()) +
                    " tokens");
  }
  if (sink_count() > 0 && !built_count_) return Internal("slice: has sinks and was never built");
  if (sealed_ && pending_.count() > 0) return Internal("slice: sealed with pending rows");
  KV_RETURN_IF_ERROR(table_->Validate());
  std::vector<bool> seen(expected, false);
  const PagedKv view = table_->view();
  for (uint32_t p = 0; p < view.page_count; ++p) {
    if (table_->residency(PageId(p)) != Residency::kWarm) continue;
    if (table_->content(PageId(p)).version >= next_version_) {
      return Internal("slice: page " + std::to_string(p) + " has a version from the future");
    }
    const uint32_t* positions = table_->positions(PageId(p));
    for (uint32_t row = 0; row < view.pages[p].fill; ++row) {
      const uint64_t index = uint64_t{positions[row]} - index_first;
      if (index >= expected || seen[index]) {
        return Internal("slice: position " + std::to_string(positions[row]) + " in page " +
                        std::to_string(p) + " is there twice or out of place");
      }
      seen[index] = true;
    }
  }
  if (policy_) return policy_->Validate(view);
  return view.page_count == 0 ? OkStatus() : Internal("slice: pages without a policy");
}

}  // namespace icecache
