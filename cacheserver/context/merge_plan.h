// MergePlan: which sealed segments of a chain are worth being one
// (docs/adr/0019-merging-segments.md).
//
// A segment joins those behind it when they hold more than 1 / kMergeGrowth of its tokens. What
// stands is then a chain of which each segment is at least kMergeGrowth times as large as all
// behind it: few, and the large one, which holds most of the answer, is one. A token is clustered
// anew only when its segment grows by a quarter or more, so all merging of a chain that grows to n
// tokens is O(n log n). Pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "common/ids.h"

namespace icecache {

// One segment of a chain, as merging sees it.
struct MergeLink {
  TenantId tenant;       // whose memory it takes
  uint32_t tokens = 0;   // up to where the next one starts
  uint32_t holders = 0;  // contexts; who holds one holds those before it
  bool may_end = false;  // whether a run may end here: it is sealed, and to be looked at
  // Tokens that its owner may hold twice: those that stay behind with contexts without the whole
  // run.
  uint64_t copied_max = 0;
};

// Segments [first, first + count) of a chain.
struct MergeRun {
  uint32_t first = 0;
  uint32_t count = 0;
  friend bool operator==(const MergeRun&, const MergeRun&) = default;
};

// The newest run to merge, as long as may be, of at most tokens_max; nullopt: the chain may stay as
// it is. All of a run is of one tenant.
std::optional<MergeRun> PlanMerge(std::span<const MergeLink> chain, uint32_t tokens_max);

}  // namespace icecache
