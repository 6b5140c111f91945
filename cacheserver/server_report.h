// The JSON of /status and the gauges of /metrics, from what the shards and the control plane
// report.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cacheserver/context/tenant.h"
#include "cacheserver/context_service.h"
#include "cacheserver/shard.h"
#include "common/metrics.h"

namespace icecache {

struct ServerReport {
  bool ready = false;
  double uptime_seconds = 0;
  uint64_t memory_size = 0;
  uint64_t control_connections = 0;
  uint64_t leases = 0;
  std::string control_address;
  std::vector<ShardStatus> shards;
  ContextReport contexts;
};

// memory.used_bytes: page frames and rows in use; memory.held_bytes: whole extents, what the pool
// is charged.
std::string StatusJson(const ServerReport& report, const TenantTable& tenants);

void SetMemoryGauges(const std::vector<ShardStatus>& shards, const TenantTable& tenants,
                     uint64_t memory_size, MetricsRegistry& metrics);

}  // namespace icecache
