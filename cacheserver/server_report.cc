#include "cacheserver/server_report.h"

#include <algorithm>
#include <chrono>
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
                        {"merged", segment.merged},
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
          {"durable", context.durable},
          {"shared", context.shared},
          {"prefix",
           {{"keys", context.prefix_keys},
            {"forks", context.prefix_forks},
            {"tokens_reused", context.prefix_tokens}}},
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
  uint64_t refused_by_quota = 0;
  uint64_t refused_by_memory = 0;
  TenantLoad load;
};

double Seconds(Duration d) { return std::chrono::duration<double>(d).count(); }

std::vector<TenantSum> SumTenants(const std::vector<ShardStatus>& shards,
                                  const TenantTable& tenants) {
  std::vector<TenantSum> sums(tenants.all().size());
  for (const ShardStatus& shard : shards) {
    for (const auto& [id, usage] : shard.tenants) {
      sums[id.value].used += usage.frame_bytes + usage.row_bytes;
      sums[id.value].held += usage.held_bytes();
      sums[id.value].refused_by_quota += usage.refused_by_quota;
      sums[id.value].refused_by_memory += usage.refused_by_memory;
    }
    for (const auto& [id, load] : shard.loads) {
      TenantLoad& sum = sums[id.value].load;
      sum.queued += load.queued;
      sum.queued_bytes += load.queued_bytes;
      sum.refused += load.refused;
      sum.expired += load.expired;
      sum.service += load.service;
    }
  }
  return sums;
}

}  // namespace

std::string StatusJson(const ServerReport& report, const TenantTable& tenants) {
  json shards = json::array();
  uint64_t used = 0, held = 0, data_connections = 0, jobs = 0;
  TierUsage tier;
  for (const ShardStatus& shard : report.shards) {
    shards.push_back(ShardJson(shard));
    used += shard.pool.frame_bytes + shard.pool.row_bytes;
    held += shard.pool.held_bytes();
    data_connections += shard.connections;
    jobs += shard.jobs;
    tier.pages_warm += shard.tier.pages_warm;
    tier.pages_cold += shard.tier.pages_cold;
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
                         {"quota_bytes", tenant.quota_bytes},
                         {"weight", tenant.weight},
                         {"requests_queued", sums[tenant.id.value].load.queued},
                         {"requests_refused", sums[tenant.id.value].load.refused},
                         {"requests_expired", sums[tenant.id.value].load.expired},
                         {"service_seconds", Seconds(sums[tenant.id.value].load.service)}});
  }
  const json status = {
      {"version", kServerVersion},
      {"ready", report.ready},
      {"uptime_seconds", report.uptime_seconds},
      {"control_address", report.control_address},
      {"memory", {{"size_bytes", report.memory_size}, {"used_bytes", used}, {"held_bytes", held}}},
      {"tier", {{"pages_warm", tier.pages_warm}, {"pages_cold", tier.pages_cold}}},
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

namespace {

// One line: texts on the wire hold no control characters, and JSON escapes those of names. Bytes
// that are no UTF-8 are shown, not refused.
std::string Text(const json& document) {
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

json RightsJson(const Rights& rights) {
  json names = json::array();
  if (rights.read) names.push_back("read");
  if (rights.write) names.push_back("write");
  if (rights.share) names.push_back("share");
  if (rights.admin) names.push_back("admin");
  return names;
}

uint64_t Millis(Duration duration) {
  return static_cast<uint64_t>(std::max<int64_t>(0, duration / std::chrono::milliseconds(1)));
}

uint64_t Of(const std::map<TenantId, uint64_t>& counts, TenantId tenant) {
  const auto it = counts.find(tenant);
  return it == counts.end() ? 0 : it->second;
}

}  // namespace

std::string ContextsJson(const std::vector<wire::ContextInfo>& contexts) {
  json all = json::array();
  for (const wire::ContextInfo& context : contexts) all.push_back(ContextJson(context));
  return Text({{"contexts", std::move(all)}});
}

std::string TenantsJson(const Viewer& viewer, const TenantTable& tenants,
                        const std::vector<ShardStatus>& shards,
                        const std::map<TenantId, uint64_t>& contexts,
                        const std::map<TenantId, uint64_t>& leases) {
  const std::vector<TenantSum> sums = SumTenants(shards, tenants);
  json all = json::array();
  for (const Tenant& tenant : tenants.all()) {
    if (!viewer.sees(tenant.id)) continue;
    all.push_back({{"name", tenant.name},
                   {"active", tenant.active},
                   {"rights", RightsJson(tenant.rights)},
                   {"weight", tenant.weight},
                   {"service_seconds", Seconds(sums[tenant.id.value].load.service)},
                   {"requests_queued", sums[tenant.id.value].load.queued},
                   {"requests_refused", sums[tenant.id.value].load.refused},
                   {"quota_bytes", tenant.quota_bytes},
                   {"held_bytes", sums[tenant.id.value].held},
                   {"used_bytes", sums[tenant.id.value].used},
                   {"contexts", Of(contexts, tenant.id)},
                   {"leases", Of(leases, tenant.id)}});
  }
  return Text({{"tenants", std::move(all)}});
}

std::string LeasesJson(const std::vector<LeaseView>& leases) {
  json all = json::array();
  for (const LeaseView& view : leases) {
    all.push_back({{"context", view.context},
                   {"context_id", view.lease.context.value},
                   {"tenant", view.tenant},
                   {"epoch", view.lease.epoch.value},
                   {"writable", view.lease.writable},
                   {"left_ms", Millis(view.left)},
                   {"peer", view.peer}});
  }
  return Text({{"leases", std::move(all)}});
}

std::string MemoryJson(const Viewer& viewer, const TenantTable& tenants,
                       const std::vector<ShardStatus>& shards) {
  const std::vector<TenantSum> sums = SumTenants(shards, tenants);
  json document = {{"tenants", json::array()}};
  for (const Tenant& tenant : tenants.all()) {
    if (!viewer.sees(tenant.id)) continue;
    document["tenants"].push_back({{"name", tenant.name},
                                   {"quota_bytes", tenant.quota_bytes},
                                   {"held_bytes", sums[tenant.id.value].held},
                                   {"used_bytes", sums[tenant.id.value].used}});
  }
  if (!viewer.admin) return Text(document);
  document["shards"] = json::array();
  uint64_t size = 0, used = 0, held = 0;
  for (const ShardStatus& shard : shards) {
    document["shards"].push_back(ShardJson(shard));
    size += shard.pool.memory_bytes;
    held += shard.pool.held_bytes();
    used += shard.pool.frame_bytes + shard.pool.row_bytes;
  }
  document["size_bytes"] = size;
  document["held_bytes"] = held;
  document["used_bytes"] = used;
  return Text(document);
}

std::string ExplainJson(const std::string& name, const std::string& why,
                        const wire::ContextInfo* info, uint32_t leases,
                        const std::vector<ContextDetail>& shards, TimePoint now) {
  json document = {{"name", name}, {"found", info != nullptr}, {"why", why}};
  if (info == nullptr) return Text(document);
  document["context"] = ContextJson(*info);
  document["leases"] = leases;
  std::map<SegmentId, SegmentDetail> sums;
  json selections = json::array();
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const auto& [id, part] : shards[i].segments) {
      SegmentDetail& sum = sums[id];
      sum.stored = part.stored && (sum.slices == 0 || sum.stored);
      sum.slices += part.slices;
      sum.warm_pages += part.warm_pages;
      sum.cold_pages += part.cold_pages;
      sum.indexed_tokens += part.indexed_tokens;
      sum.pending_tokens += part.pending_tokens;
      sum.kv_bytes += part.kv_bytes;
      sum.index_bytes += part.index_bytes;
    }
    for (const SelectionRecord& one : shards[i].selections) {
      selections.push_back({{"shard", i},
                            {"age_ms", Millis(now - one.when)},
                            {"layer", one.layer.value},
                            {"heads", one.heads},
                            {"pages", one.pages},
                            {"resident_pages", one.resident_pages},
                            {"tokens_read", one.tokens_read},
                            {"covered_mass", one.covered_mass},
                            {"select_us", static_cast<double>(one.select_ns) / 1e3}});
    }
  }
  json segments = json::array();
  uint64_t warm = 0, cold = 0;
  for (const wire::SegmentInfo& segment : info->segments) {
    const SegmentDetail& sum = sums[segment.id];
    segments.push_back({{"id", segment.id.value},
                        {"tokens", segment.tokens},
                        {"sealed", segment.sealed},
                        {"references", segment.references},
                        {"merged", segment.merged},
                        {"stored", sum.stored},
                        {"warm_pages", sum.warm_pages},
                        {"cold_pages", sum.cold_pages},
                        {"indexed_rows", sum.indexed_tokens},
                        {"pending_rows", sum.pending_tokens},
                        {"bytes", sum.kv_bytes},
                        {"index_bytes", sum.index_bytes}});
    warm += sum.warm_pages;
    cold += sum.cold_pages;
  }
  document["pages"] = {{"warm", warm}, {"cold", cold}};
  document["segments"] = std::move(segments);
  document["selections"] = std::move(selections);
  return Text(document);
}

std::string VerifyJson(const std::vector<VerifyResult>& shards, uint64_t contexts) {
  uint64_t slices = 0, pages = 0, damaged = 0;
  json damage = json::array();
  for (const VerifyResult& shard : shards) {
    slices += shard.slices;
    pages += shard.pages;
    damaged += shard.damaged_slices;
    for (const std::string& one : shard.damage) damage.push_back(one);
  }
  return Text({{"contexts", contexts},
               {"slices", slices},
               {"pages", pages},
               {"damaged_slices", damaged},
               {"damage", std::move(damage)}});
}

namespace {

void SetLoadMetrics(const std::string& tenant, const TenantLoad& load, MetricsRegistry& metrics) {
  const MetricLabels labels = {{"tenant", tenant}};
  metrics
      .GetGauge("icecache_tenant_requests_queued", "Data-plane requests that wait for their turn.",
                labels)
      .Set(static_cast<int64_t>(load.queued));
  metrics
      .GetCounter("icecache_tenant_requests_refused_total",
                  "Data-plane requests refused because too much of their tenant waited.", labels)
      .Set(load.refused);
  metrics
      .GetCounter("icecache_tenant_requests_expired_total",
                  "Data-plane requests whose deadline passed before their turn came.", labels)
      .Set(load.expired);
  metrics
      .GetCounter("icecache_tenant_service_seconds_total",
                  "Time that shards have worked for a tenant: what is shared out by weight.",
                  labels)
      .Set(static_cast<uint64_t>(load.service.count()));
}

}  // namespace

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
    const auto pages = [&](const char* tier, uint64_t value) {
      metrics
          .GetGauge("icecache_pages", "Pages in frames of memory, and of those that only the disk holds.",
                    {{"shard", id}, {"tier", tier}})
          .Set(static_cast<int64_t>(value));
    };
    pages("memory", shard.pool.frames - shard.pool.waiting_frames);
    pages("disk", shard.tier.pages_cold);
    set("icecache_segments_stored", "Sealed segments in memory that are on disk too.",
        shard.tier.segments_stored);
    set("icecache_cluster_jobs", "Builds and re-clusterings running or waiting.", shard.jobs);
  }
  const std::vector<TenantSum> sums = SumTenants(shards, tenants);
  for (const Tenant& tenant : tenants.all()) {
    metrics
        .GetGauge("icecache_tenant_held_bytes", "Memory charged to a tenant.",
                  {{"tenant", tenant.name}})
        .Set(static_cast<int64_t>(sums[tenant.id.value].held));
    metrics
        .GetGauge("icecache_tenant_quota_bytes", "Memory that a tenant may hold; 0: all there is.",
                  {{"tenant", tenant.name}})
        .Set(static_cast<int64_t>(tenant.quota_bytes));
    const auto refused = [&](const char* name, const char* help, uint64_t count) {
      metrics.GetCounter(name, help, {{"tenant", tenant.name}}).Set(count);
    };
    refused("icecache_quota_refusals_total",
            "Reservations refused by a tenant's quota; each try of one that waits counts.",
            sums[tenant.id.value].refused_by_quota);
    refused("icecache_memory_refusals_total",
            "Reservations refused because --memory-size is used up; each try of one that waits counts.",
            sums[tenant.id.value].refused_by_memory);
    SetLoadMetrics(tenant.name, sums[tenant.id.value].load, metrics);
  }
}

namespace {

struct StoreCounter {
  const char* counter;  // of ColdStore::VisitCounters
  const char* metric;
  const char* help;
};
constexpr StoreCounter kStoreCounters[] = {
    {"puts", "icecache_cold_store_writes_total", "Batches written to the cold store."},
    {"put_bytes", "icecache_cold_store_written_bytes_total",
     "Keys and values written to the cold store."},
    {"gets", "icecache_cold_store_reads_total", "Values asked of the cold store."},
    {"get_misses", "icecache_cold_store_read_misses_total",
     "Values that the cold store did not have."},
    {"write_stalls", "icecache_cold_store_stalls_total",
     "Times that RocksDB has slowed or stopped writes until it had caught up."},
    {"background_errors", "icecache_cold_store_background_errors_total",
     "Failures of RocksDB's own work: flushes and compactions."},
};

}  // namespace

void SetStoreMetrics(const ColdStore& store, MetricsRegistry& metrics) {
  store.VisitCounters([&](std::string_view name, double value) {
    for (const StoreCounter& c : kStoreCounters) {
      if (name == c.counter)
        metrics.GetCounter(c.metric, c.help).Set(static_cast<uint64_t>(value));
    }
    if (name != "disk_bytes") return;
    metrics.GetGauge("icecache_cold_store_disk_bytes", "Size of the cold store's tables on disk.")
        .Set(static_cast<int64_t>(value));
  });
}

}  // namespace icecache
