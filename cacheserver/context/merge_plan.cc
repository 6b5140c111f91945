#include "cacheserver/context/merge_plan.h"

#include <algorithm>

#include "common/limits.h"

namespace icecache {

std::optional<MergeRun> PlanMerge(std::span<const MergeLink> chain, uint32_t tokens_max) {
  for (size_t last = chain.size(); last-- > 1;) {
    if (!chain[last].may_end) continue;
    // As far back as there is one that joins, and all between.
    std::optional<MergeRun> run;
    uint64_t behind = chain[last].tokens, copied = 0;
    for (size_t i = last; i-- > 0;) {
      const MergeLink& older = chain[i];
      if (older.tenant != chain[last].tenant || behind + older.tokens > tokens_max) break;
      if (older.holders > chain[last].holders) copied += older.tokens;
      if (copied > chain[last].copied_max) break;
      if (older.tokens < limits::kMergeGrowth * std::max<uint64_t>(1, behind))
        run = {static_cast<uint32_t>(i), static_cast<uint32_t>(last - i + 1)};
      behind += older.tokens;
    }
    if (run) return run;
  }
  return std::nullopt;
}

}  // namespace icecache
