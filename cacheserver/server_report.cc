#include "cacheserver/server_report.h"

#include <nlohmann/json.hpp>

#include "cacheserver/server_config.h"

namespace icecache {
namespace {

using nlohmann::json;

json ContextJson(const wire::ContextInfo& context) {
  json segments = json::array();
  for (const wire::SegmentInfo& segment : context.segments) {
    segments.push_back({{"id", segment.id.value},
                        {"tokens", segment.tokens},
                        {"sealed", segment.sealed},
                        {"references", segment.references},
                        {"bytes", segment.bytes},
                        {"index_bytes", segment.index_bytes}});
  }
  return {{"id", context.id.value},
          {"name", context.name},
          {"tenant", context.tenant},
          {"model", context.model},
          {"shape", context.shape.ToString()},
          {"policy", context.policy},
          {"tokens", context.tokens},
          {"sealed", context.sealed},
          {"published", context.published},
          {"segments", std::move(segments)}};
}

json ShardJson(const ShardStatus& shard) {
  return {{"id", shard.id.value},
          {"address", shard.address},
          {"transport", shard.transport},
          {"contexts", shard.contexts},
          {"leases", shard.leases},
          {"jobs", shard.jobs},
          {"connections", shard.connections},
          {"memory_bytes", shard.pool.memory_bytes},
          {"held_bytes", shard.pool.held_bytes()},
          {"frame_bytes", shard.pool.frame_bytes},
          {"row_bytes", shard.pool.row_bytes},
          {"waiting_frames", shard.pool.waiting_frames}};
}

struct TenantSum {
  uint64_t used = 0;
  uint64_t held = 0;
};

std::vector<TenantSum> SumTenants(const std::vector<ShardStatus>& shards,
                                  const TenantTable& tenants) {
  std::vector<TenantSum> sums(tenants.all().size());
  for (const ShardStatus& shard : shards) {
    for (const auto& [id, usage] : shard.tenants) {
      sums[id.value].used += usage.frame_bytes + usage.row_bytes;
      sums[id.value].held += usage.held_bytes();
    }
  }
  return sums;
}

}  // namespace

std::string StatusJson(const ServerReport& report, const TenantTable& tenants) {
  json shards = json::array();
  uint64_t used = 0, held = 0, data_connections = 0, jobs = 0;
  for (const ShardStatus& shard : report.shards) {
    shards.push_back(ShardJson(shard));
    used += shard.pool.frame_bytes + shard.pool.row_bytes;
    held += shard.pool.held_bytes();
    data_connections += shard.connections;
    jobs += shard.jobs;
  }
  json contexts = json::array();
  for (const wire::ContextInfo& context : report.contexts.contexts)
    contexts.push_back(ContextJson(context));
  const std::vector<TenantSum> sums = SumTenants(report.shards, tenants);
  json by_tenant = json::array();
  for (const Tenant& tenant : tenants.all()) {
    by_tenant.push_back({{"name", tenant.name},
                         {"active", tenant.active},
                         {"used_bytes", sums[tenant.id.value].used},
                         {"held_bytes", sums[tenant.id.value].held},
                         {"quota_bytes", tenant.quota_bytes}});
  }
  const json status = {
      {"version", kServerVersion},
      {"ready", report.ready},
      {"uptime_seconds", report.uptime_seconds},
      {"control_address", report.control_address},
      {"memory", {{"size_bytes", report.memory_size}, {"used_bytes", used}, {"held_bytes", held}}},
      {"segments",
       {{"count", report.contexts.segments},
        {"kv_bytes", report.contexts.kv_bytes},
        {"index_bytes", report.contexts.index_bytes}}},
      {"leases", report.leases},
      {"cluster_jobs", jobs},
      {"connections", {{"control", report.control_connections}, {"data", data_connections}}},
      {"tenants", std::move(by_tenant)},
      {"contexts", std::move(contexts)},
      {"shards", std::move(shards)}};
  // Names may hold bytes that are no UTF-8: shown, not refused.
  return status.dump(1, ' ', false, json::error_handler_t::replace) + "\n";
}

void SetMemoryGauges(const std::vector<ShardStatus>& shards, const TenantTable& tenants,
                     uint64_t memory_size, MetricsRegistry& metrics) {
  metrics
      .GetGauge("icecache_memory_size_bytes", "Memory that the server may use for pages and rows.")
      .Set(static_cast<int64_t>(memory_size));
  for (const ShardStatus& shard : shards) {
    const std::string id = std::to_string(shard.id.value);
    auto set = [&](const char* name, const char* help, uint64_t value) {
      metrics.GetGauge(name, help, {{"shard", id}}).Set(static_cast<int64_t>(value));
    };
    set("icecache_pool_held_bytes", "Memory taken from the pool, in whole extents and rows.",
        shard.pool.held_bytes());
    set("icecache_pool_frame_bytes", "Page frames in use.", shard.pool.frame_bytes);
    set("icecache_pool_row_bytes", "Rows outside the index: sinks, tails, pending.",
        shard.pool.row_bytes);
    set("icecache_pool_waiting_frames", "Frames released that a reply may still read.",
        shard.pool.waiting_frames);
    set("icecache_cluster_jobs", "Builds and re-clusterings running or waiting.", shard.jobs);
  }
  const std::vector<TenantSum> sums = SumTenants(shards, tenants);
  for (const Tenant& tenant : tenants.all()) {
    metrics
        .GetGauge("icecache_tenant_held_bytes", "Memory charged to a tenant.",
                  {{"tenant", tenant.name}})
        .Set(static_cast<int64_t>(sums[tenant.id.value].held));
  }
}

}  // namespace icecache
