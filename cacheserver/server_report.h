// The JSON of /status and the gauges of /metrics, from what the shards and the control plane
// report.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cacheserver/context/tenant.h"
#include "cacheserver/context_service.h"
#include "cacheserver/shard.h"
#include "cacheserver/store/cold_store.h"
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

// The documents of wire::Inspect (docs/server.md). admin: of all tenants, else of `tenant` alone.
struct Viewer {
  TenantId tenant;
  bool admin = false;
  bool sees(TenantId other) const { return admin || other == tenant; }
};
std::string ContextsJson(const std::vector<wire::ContextInfo>& contexts);
// contexts, leases: how many of each tenant there are.
std::string TenantsJson(const Viewer& viewer, const TenantTable& tenants,
                        const std::vector<ShardStatus>& shards,
                        const std::map<TenantId, uint64_t>& contexts,
                        const std::map<TenantId, uint64_t>& leases);
struct LeaseView {
  Lease lease;
  std::string context, tenant, peer;
  Duration left{0};
};
std::string LeasesJson(const std::vector<LeaseView>& leases);
std::string MemoryJson(const Viewer& viewer, const TenantTable& tenants,
                       const std::vector<ShardStatus>& shards);
// info: nullptr when there is no such context. why: in words. now: for the age of selections.
std::string ExplainJson(const std::string& name, const std::string& why,
                        const wire::ContextInfo* info, uint32_t leases,
                        const std::vector<ContextDetail>& shards, TimePoint now);
std::string VerifyJson(const std::vector<VerifyResult>& shards, uint64_t contexts);

void SetMemoryGauges(const std::vector<ShardStatus>& shards, const TenantTable& tenants,
                     uint64_t memory_size, MetricsRegistry& metrics);
// What the store counts itself. Cheap: no disk is asked.
void SetStoreMetrics(const ColdStore& store, MetricsRegistry& metrics);

}  // namespace icecache
