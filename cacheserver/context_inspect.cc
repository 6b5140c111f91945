// What the control plane tells of contexts, and its reports (wire::Inspect): a tenant sees what is
// its own, an admin everything.
#include <algorithm>
#include <utility>

#include "cacheserver/context_service.h"
#include "cacheserver/server_report.h"
#include "common/limits.h"

namespace icecache {
namespace {

std::string Ago(Duration age) {
  return std::to_string(std::max<int64_t>(0, age / std::chrono::seconds(1))) + " s ago";
}

}  // namespace

wire::ContextInfo ContextService::Info(const ContextRecord& record,
                                       const std::vector<Holdings>& holdings) const {
  wire::ContextInfo info;
  info.id = record.id;
  info.name = record.name;
  info.shape = record.traits.shape;
  info.model = record.traits.model;
  info.tokens = record.tokens;
  info.sink_tokens = record.traits.sink_tokens;
  info.window_tokens = record.traits.window_tokens;
  info.tail_tokens = record.tail_tokens;
  info.policy = std::string(PolicyKindName(record.traits.policy));
  info.seed = record.traits.seed;
  info.sealed = record.sealed;
  info.published = record.published;
  info.durable = record.durable && record.published;
  info.shared = record.shared;
  info.prefix_keys = record.prefix ? static_cast<uint32_t>(record.prefix->keys.size()) : 0;
  info.prefix_forks = record.prefix_forks;
  info.prefix_tokens = record.prefix_tokens;
  info.tenant = tenants_.Get(record.tenant).name;
  for (const Holdings& of_shard : holdings) {
    auto end = of_shard.ends.find(record.id);
    if (end != of_shard.ends.end()) info.tokens = std::max(info.tokens, end->second);
  }
  for (SegmentId id : record.chain) {
    const std::optional<SegmentRecord> segment = table_.FindSegment(id);
    KV_CHECK(segment.has_value());
    wire::SegmentInfo part;
    part.id = id;
    part.sealed = segment->sealed;
    part.references = segment->references;
    part.merged = segment->merged;
    part.tokens =
        segment->sealed ? segment->tokens() : info.tokens - (record.tokens - record.tail_tokens);
    for (const Holdings& of_shard : holdings) {
      auto bytes = of_shard.segments.find(id);
      if (bytes == of_shard.segments.end()) continue;
      part.bytes += bytes->second.kv_bytes;
      part.index_bytes += bytes->second.index_bytes;
    }
    info.segments.push_back(part);
  }
  return info;
}

void ContextService::Describe(std::vector<ContextRecord> records,
                              std::function<void(std::vector<wire::ContextInfo>)> done) {
  std::vector<ContextId> ids;
  for (const ContextRecord& record : records) ids.push_back(record.id);
  shards_.Gather<Holdings>(
      [ids](Shard& shard) { return shard.HoldingsOf(ids); },
      [this, ids, done = std::move(done)](const std::vector<Holdings>& holdings) {
        std::vector<wire::ContextInfo> contexts;
        for (ContextId id : ids) {
          // As it is now: it may have been sealed or dropped meanwhile.
          if (const ContextRecord* record = table_.Find(id))
            contexts.push_back(Info(*record, holdings));
        }
        done(std::move(contexts));
      });
}

void ContextService::Report(std::function<void(ContextReport)> done) {
  Describe(table_.ListAll(), [done = std::move(done)](std::vector<wire::ContextInfo> contexts) {
    ContextReport report;
    std::map<SegmentId, const wire::SegmentInfo*> distinct;
    for (const wire::ContextInfo& context : contexts) {
      for (const wire::SegmentInfo& segment : context.segments)
        distinct.emplace(segment.id, &segment);
    }
    report.segments = distinct.size();
    for (const auto& [id, segment] : distinct) {
      report.kv_bytes += segment->bytes;
      report.index_bytes += segment->index_bytes;
    }
    report.contexts = std::move(contexts);
    done(std::move(report));
  });
}

void ContextService::Do(const Caller& caller, const wire::Inspect& request, Done done) {
  const Viewer viewer{caller.tenant, tenants_.Get(caller.tenant).rights.admin};
  switch (request.topic) {
    case wire::InspectTopic::kContexts:
      return Describe(viewer.admin ? table_.ListAll() : table_.List(caller.tenant),
                      [done = std::move(done)](const std::vector<wire::ContextInfo>& contexts) {
                        done(wire::Report{ContextsJson(contexts)});
                      });
    case wire::InspectTopic::kTenants:
      return ReportTenants(caller, std::move(done));
    case wire::InspectTopic::kLeases:
      return ReportLeases(caller, done);
    case wire::InspectTopic::kMemory:
      return shards_.Gather<ShardStatus>(
          [](Shard& shard) { return shard.status(); },
          [this, viewer, done = std::move(done)](const std::vector<ShardStatus>& shards) {
            done(wire::Report{MemoryJson(viewer, tenants_, shards)});
          });
    case wire::InspectTopic::kExplain:
      return Explain(caller, request.name, std::move(done));
    case wire::InspectTopic::kVerify:
      return Verify(caller, request.name, std::move(done));
  }
}

void ContextService::ReportTenants(const Caller& caller, Done done) {
  const Viewer viewer{caller.tenant, tenants_.Get(caller.tenant).rights.admin};
  shards_.Gather<ShardStatus>(
      [](Shard& shard) { return shard.status(); },
      [this, viewer, done = std::move(done)](const std::vector<ShardStatus>& shards) {
        std::map<TenantId, uint64_t> contexts, leases;
        for (const ContextRecord& record : table_.ListAll()) ++contexts[record.tenant];
        for (const Lease& lease : leases_.List()) ++leases[lease.tenant];
        done(wire::Report{TenantsJson(viewer, tenants_, shards, contexts, leases)});
      });
}

void ContextService::ReportLeases(const Caller& caller, const Done& done) {
  const Viewer viewer{caller.tenant, tenants_.Get(caller.tenant).rights.admin};
  std::vector<LeaseView> views;
  for (const Lease& lease : leases_.List()) {
    if (!viewer.sees(lease.tenant)) continue;
    const ContextRecord* record = table_.Find(lease.context);
    views.push_back({.lease = lease,
                     .context = record == nullptr ? "" : record->name,
                     .tenant = tenants_.Get(lease.tenant).name,
                     .peer = hooks_.peer ? hooks_.peer(lease.connection) : "",
                     .left = lease.expires - leases_.clock().Now()});
  }
  done(wire::Report{LeasesJson(views)});
}

void ContextService::RememberEnd(const ContextRecord& record, std::string reason) {
  if (ended_.size() >= limits::kEndedRememberedMax) ended_.pop_front();
  ended_.push_back({record.tenant, record.name, std::move(reason), leases_.clock().Now()});
}

std::string ContextService::WhyGone(TenantId tenant, const std::string& name) const {
  const auto last = std::find_if(ended_.rbegin(), ended_.rend(), [&](const Ended& ended) {
    return ended.tenant == tenant && ended.name == name;
  });
  if (last == ended_.rend()) {
    return "no context of this name has ended since the server started " +
           Ago(leases_.clock().Now() - started_) +
           "; is the name right, and the tenant? What was not durable ended with the server before";
  }
  return "gone since " + Ago(leases_.clock().Now() - last->when) + ": " + last->reason;
}

// What Open would say, and what to do about it.
std::string ContextService::WhyThere(const ContextRecord& record) const {
  if (!admitting_) return "the server is draining: Open is refused";
  if (record.published && !record.loaded)
    return "published, durable and on disk: the first Open or Fork reads it";
  if (record.published) return "published: Open and Fork serve it";
  if (record.sealed) return "sealed and not published: only its creator can use it; publish it";
  return "still written by its creator: it can be opened once it is sealed and published";
}

void ContextService::Explain(const Caller& caller, const std::string& name, Done done) {
  const ContextRecord* record = table_.FindByName(caller.tenant, name);
  if (record == nullptr) {
    return done(
        wire::Report{ExplainJson(name, WhyGone(caller.tenant, name), nullptr, 0, {}, TimePoint())});
  }
  Describe({*record}, [this, caller, name, id = record->id,
                       done = std::move(done)](const std::vector<wire::ContextInfo>& infos) {
    shards_.Gather<ContextDetail>(
        [id](Shard& shard) { return shard.Detail(id); },
        [this, caller, name, id, infos, done](const std::vector<ContextDetail>& shards) {
          const ContextRecord* now = table_.Find(id);
          const bool there = now != nullptr && !infos.empty();
          done(wire::Report{ExplainJson(name, there ? WhyThere(*now) : WhyGone(caller.tenant, name),
                                        there ? &infos.front() : nullptr, leases_.CountOf(id),
                                        shards, leases_.clock().Now())});
        });
  });
}

void ContextService::Verify(const Caller& caller, const std::string& name, Done done) {
  std::vector<ContextRecord> records;
  if (name.empty()) {
    const bool admin = tenants_.Get(caller.tenant).rights.admin;
    records = admin ? table_.ListAll() : table_.List(caller.tenant);
  } else if (const ContextRecord* record = table_.FindByName(caller.tenant, name)) {
    records.push_back(*record);
  } else {
    return done(NotFound("verify: no context '" + name + "'"));
  }
  std::vector<ContextId> ids;
  for (const ContextRecord& record : records) ids.push_back(record.id);
  shards_.GatherLater<VerifyResult>(
      [ids](Shard& shard, std::function<void(VerifyResult)> answer) {
        shard.Verify(ids, std::move(answer));
      },
      [count = ids.size(), done = std::move(done)](const std::vector<VerifyResult>& shards) {
        done(wire::Report{VerifyJson(shards, count)});
      });
}

}  // namespace icecache
