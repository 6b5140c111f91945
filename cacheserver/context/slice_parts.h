// What a HeadSlice is made of and hands out. Values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "cacheserver/store/page_table.h"
#include "common/ids.h"
#include "kernels/paged_kv.h"

namespace icecache {

struct SliceOptions {
  SegmentId segment;
  uint32_t first_position = 0;
  TenantId tenant;
  DType dtype = DType::kF16;
  uint32_t head_dim = 0;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint64_t seed = 1;
};

// Unindexed rows that a reply may send; `pin` keeps them.
struct RowsView {
  uint32_t first_position = 0;
  TokenRows rows;
  std::shared_ptr<const void> pin;
};

// A stored index, read back.
struct SliceIndex {
  std::vector<PageTable::PageName> pages;
  std::unique_ptr<SelectionPolicy> policy;
};

}  // namespace icecache
