// What a shard tells of itself and of contexts: to the control plane, /status, and icecachectl's
// explain and verify. Values.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cacheserver/store/page_pool.h"
#include "cacheserver/tenant_work.h"
#include "cacheserver/tier.h"
#include "common/clock.h"
#include "common/ids.h"

namespace icecache {

struct SegmentBytes {
  uint64_t kv_bytes = 0;
  uint64_t index_bytes = 0;
};
// This shard's part of some contexts. A segment that several of them share is there once.
struct Holdings {
  std::map<SegmentId, SegmentBytes> segments;
  std::map<ContextId, uint32_t> ends;  // of contexts that grow: after the last position held
};

struct ShardStatus {
  ShardId id;
  PoolUsage pool;
  TierUsage tier;
  std::map<TenantId, TenantUsage> tenants;
  std::map<TenantId, TenantLoad> loads;
  uint64_t contexts = 0;
  uint64_t leases = 0;
  uint64_t jobs = 0;         // clustering: running or waiting for a thread
  uint64_t connections = 0;  // of the data plane; filled in by the server
  std::string address;       // likewise
  std::string transport;     // likewise
};

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
