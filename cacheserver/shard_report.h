// What a shard tells of a context to those who ask: icecachectl's explain and verify. Values.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/ids.h"

namespace icecache {

// What `explain` tells of a context on one shard.
struct SegmentDetail {
  uint32_t slices = 0;
  bool stored = false;          // on disk too, so that its pages may leave memory
  uint64_t warm_pages = 0;      // in memory
  uint64_t cold_pages = 0;      // on disk only, or on their way
  uint64_t indexed_tokens = 0;  // summed over slices, like the following
  uint64_t pending_tokens = 0;
  uint64_t kv_bytes = 0;
  uint64_t index_bytes = 0;
};
struct SelectionRecord {
  TimePoint when;
  LayerId layer;
  uint32_t heads = 0;
  uint32_t pages = 0;           // chosen, over all heads
  uint32_t resident_pages = 0;  // of those, the worker had
  uint32_t tokens_read = 0;     // exactly, for the residual
  float covered_mass = 0;       // mean over heads: share of the softmax that the pages hold
  uint64_t select_ns = 0;
};
struct ContextDetail {
  bool found = false;
  std::map<SegmentId, SegmentDetail> segments;
  std::vector<SelectionRecord> selections;  // the last ones, oldest first
};
struct VerifyResult {
  uint64_t slices = 0;
  uint64_t pages = 0;
  std::vector<std::string> damage;  // the first kDamageReportedMax
  uint64_t damaged_slices = 0;
};

}  // namespace icecache
