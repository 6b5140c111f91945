#include "cacheserver/context/chain_rows.h"

#include <algorithm>
#include <string>

namespace icecache {
namespace {

bool Overlaps(const HeadSlice& slice, const RowRange& range) {
  return slice.options().first_position < range.first + range.count && slice.end() > range.first;
}

// What of the slice must come back before its rows can be read.
void ListMissing(const std::shared_ptr<const Segment>& segment, const HeadSlice& slice,
                 LayerId layer, KvHeadId head, const RowRange& range, Misses* misses) {
  if (!slice.index_loaded()) {
    misses->slices.push_back({segment, layer, head, true, {}});
    return;
  }
  if (!slice.IndexOverlaps(range.first, range.count)) return;
  // Which page holds a position is written in the page: all must be there.
  std::vector<PageId> cold = slice.table().ColdPages();
  if (!cold.empty()) misses->slices.push_back({segment, layer, head, false, std::move(cold)});
}

}  // namespace

Status ReadChainRows(std::span<const std::shared_ptr<const Segment>> chain, const Segment* tail,
                     LayerId layer, KvHeadId head, const RowRange& range, Misses* misses) {
  const size_t missed = misses->slices.size();
  uint32_t end = 0;
  for (const std::shared_ptr<const Segment>& segment : chain) {
    const HeadSlice& slice = *segment->slice(layer, head);
    end = std::max(end, slice.end());
    if (Overlaps(slice, range)) ListMissing(segment, slice, layer, head, range, misses);
  }
  if (misses->slices.size() > missed) return OkStatus();
  const HeadSlice* growing = tail == nullptr ? nullptr : tail->slice(layer, head);
  if (growing != nullptr) end = std::max(end, growing->end());
  if (range.count > end || range.first > end - range.count) {
    return OutOfRange("rows [" + std::to_string(range.first) + ", " +
                      std::to_string(uint64_t{range.first} + range.count) +
                      "): the context holds " + std::to_string(end) + " tokens");
  }
  // A child has its own copy of its parent's tail; where it has not got so far, the parent's counts.
  for (const std::shared_ptr<const Segment>& segment : chain) {
    segment->slice(layer, head)->CopyRows(range.first, range.count, range.k, range.v);
  }
  if (growing != nullptr) growing->CopyRows(range.first, range.count, range.k, range.v);
  return OkStatus();
}

}  // namespace icecache
