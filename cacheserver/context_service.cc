#include "cacheserver/context_service.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "common/log.h"

namespace icecache {

namespace {

Counter& PrefixCounter(MetricsRegistry& metrics, const char* result) {
  return metrics.GetCounter("icecache_prefix_matches_total",
                            "Questions for a context that begins with a prompt, by result.",
                            {{"result", result}});
}

}  // namespace

const char* ControlRequestName(const ControlRequestBody& request) {
  constexpr const char* kNames[] = {"hello",   "create",  "open",  "fork",         "seal",
                                    "publish", "release", "drop",  "list",         "describe",
                                    "renew",   "inspect", "drain", "match_prefix", "share_frames"};
  static_assert(std::size(kNames) == std::variant_size_v<ControlRequestBody>);
  return kNames[request.index()];
}

ContextService::ContextService(ShardGroup& shards, TenantTable& tenants, LeaseTable& leases,
                               MetricsRegistry& metrics, ContextStore* store,
                               uint64_t first_segment)
    : shards_(shards),
      tenants_(tenants),
      leases_(leases),
      metrics_(metrics),
      lease_gauge_(metrics.GetGauge("icecache_leases", "Leases that are alive.")),
      context_gauge_(metrics.GetGauge("icecache_contexts", "Contexts that the server holds.")),
      segment_gauge_(metrics.GetGauge("icecache_segments", "Segments that the contexts share.")),
      sharing_gauge_(metrics.GetGauge(
          "icecache_sharing_workers",
          "Workers that share their device's page frames with others of their host and tenant.")),
      prefix_hits_(PrefixCounter(metrics, "hit")),
      prefix_misses_(PrefixCounter(metrics, "miss")),
      prefix_tokens_(metrics.GetCounter(
          "icecache_prefix_tokens_reused_total",
          "Tokens of forks that began with a match: what workers did not prefill.")),
      store_(store),
      table_(first_segment),
      merger_(shards, table_, store, leases.clock(), metrics,
              {.commit =
                   [this](ContextId id, const MergedRun& merge, std::function<void(Status)> done) {
                     CommitMerged(id, merge, std::move(done));
                   },
               .busy =
                   [this](ContextId id) {
                     return loading_.contains(id) || committing_.contains(id);
                   }}) {}

void ContextService::CountGauges() {
  lease_gauge_.Set(leases_.count());
  context_gauge_.Set(table_.count());
  segment_gauge_.Set(table_.segment_count());
  sharing_gauge_.Set(frames_.count());
}

void ContextService::Handle(ConnectionId connection, TenantId tenant,
                            const ControlRequestBody& request, Done done) {
  const char* name = ControlRequestName(request);
  Done counted = [this, name, done = std::move(done)](ControlReplyBody body) {
    const Status* error = std::get_if<Status>(&body);
    metrics_
        .GetCounter(
            "icecache_control_requests_total", "Control-plane requests by kind and result.",
            {{"kind", name},
             {"result", std::string(StatusCodeName(error ? error->code() : StatusCode::kOk))}})
        .Add();
    CountGauges();
    done(std::move(body));
  };
  const Caller caller{connection, tenant};
  std::visit([&](const auto& body) { Do(caller, body, std::move(counted)); }, request);
}

Status ContextService::CheckAdmit(const Caller& caller, bool write) const {
  if (!admitting_) {
    return Unavailable(
        "the server is draining and takes no new contexts; use another one or retry after its "
        "restart");
  }
  const Tenant& tenant = tenants_.Get(caller.tenant);
  if (write ? tenant.rights.write : tenant.rights.read) return OkStatus();
  return PermissionDenied("tenant '" + tenant.name + "' has no right to " +
                          (write ? "write" : "read") +
                          "; add it to rights in the token file and send the server SIGHUP");
}

void ContextService::Admit(const Caller& caller, const ContextRecord& record, Make make,
                           Done done) {
  Result<Lease> lease = leases_.Grant(record.id, caller.tenant, caller.connection, true);
  if (!lease.ok()) {
    (void)table_.Remove(record.id);
    return done(lease.status());
  }
  struct Made {
    Status status;
    Holdings holdings;
  };
  shards_.GatherLater<Made>(
      [make = std::move(make), lease = *lease](Shard& shard, std::function<void(Made)> answer) {
        // First the lease: what ends it while the context is made comes behind it.
        shard.AddLease(lease);
        make(shard, [&shard, id = lease.context, answer = std::move(answer)](const Status& status) {
          answer({status, shard.HoldingsOf(std::span(&id, 1))});
        });
      },
      [this, lease = *lease, done = std::move(done)](std::vector<Made> all) {
        std::vector<Holdings> holdings;
        for (Made& made : all) {
          if (!made.status.ok()) {
            DropContext(lease.context);
            return done(made.status);
          }
          holdings.push_back(std::move(made.holdings));
        }
        FinishGrant(lease, std::move(holdings), done);
      });
}

void ContextService::FinishGrant(const Lease& lease, std::vector<Holdings> holdings,
                                 const Done& done) {
  const ContextRecord* record = table_.Find(lease.context);
  // Dropped, or its connection ended, while the shards were at it.
  if (record == nullptr || !leases_.Alive(lease.epoch)) {
    return done(Cancelled("the context was dropped or its lease ended before it was granted"));
  }
  wire::Grant grant;
  grant.context = Info(*record, holdings);
  grant.epoch = lease.epoch;
  grant.ticket = lease.ticket;
  grant.lease_ms = static_cast<uint32_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(leases_.lease_time()).count());
  done(std::move(grant));
}

void ContextService::Do(const Caller& caller, const wire::Create& request, Done done) {
  if (Status status = CheckAdmit(caller, true); !status.ok()) return done(status);
  Result<PolicyKind> policy = ParsePolicyKind(request.policy);
  if (!policy.ok()) return done(policy.status());
  Result<ContextRecord> record = table_.Create(caller.tenant, request.name,
                                               {.shape = request.shape,
                                                .model = request.model,
                                                .sink_tokens = request.sink_tokens,
                                                .window_tokens = request.window_tokens,
                                                .policy = *policy,
                                                .seed = request.seed});
  if (!record.ok()) return done(record.status());
  Admit(
      caller, *record,
      [spec = SpecOf(*record)](Shard& shard, const std::function<void(Status)>& made) {
        made(shard.CreateContext(spec));
      },
      std::move(done));
}

void ContextService::Do(const Caller& caller, const wire::Open& request, Done done) {
  if (Status status = CheckAdmit(caller, false); !status.ok()) return done(status);
  const ContextRecord* record = table_.FindByName(caller.tenant, request.name);
  if (record == nullptr || !record->published) {
    return done(NotFound("open: no published context '" + request.name + "'"));
  }
  WithLoaded(record->id,
             [this, caller, id = record->id, done = std::move(done)](const Status& loaded) {
               if (!loaded.ok()) return done(loaded.WithContext("open"));
               GrantRead(caller, id, done);
             });
}

void ContextService::GrantRead(const Caller& caller, ContextId id, const Done& done) {
  if (table_.Find(id) == nullptr) return done(Cancelled("the context was dropped"));
  Result<Lease> lease = leases_.Grant(id, caller.tenant, caller.connection, false);
  if (!lease.ok()) return done(lease.status());
  shards_.Gather<Holdings>(
      [lease = *lease](Shard& shard) {
        shard.AddLease(lease);
        return shard.HoldingsOf(std::span(&lease.context, 1));
      },
      [this, lease = *lease, done](std::vector<Holdings> holdings) {
        FinishGrant(lease, std::move(holdings), done);
      });
}

Result<ContextRecord> ContextService::Owned(const Caller& caller, ContextId id) const {
  const ContextRecord* record = table_.Find(id);
  // One answer for what is not there, another tenant's and another connection's: ids tell nothing.
  const std::optional<Lease> lease = leases_.Find(caller.connection, id);
  if (record == nullptr || !lease || record->tenant != caller.tenant) {
    return NotFound("context " + std::to_string(id.value) +
                    ": this connection holds no lease on it");
  }
  if (!lease->writable) {
    return PermissionDenied("context '" + record->name + "' was opened to read by this connection");
  }
  return *record;
}

void ContextService::Do(const Caller& caller, const wire::Seal& request, Done done) {
  Result<ContextRecord> record = Owned(caller, request.context);
  if (!record.ok()) return done(record.status());
  if (record->sealed) return done(wire::Done{});
  const Lease lease = *leases_.Find(caller.connection, record->id);
  using Ends = Result<std::optional<uint32_t>>;
  shards_.Gather<Ends>(
      [id = record->id](Shard& shard) { return shard.CheckSealable(id); },
      [this, id = record->id, lease, keys = request.keys, done = std::move(done)](
          const std::vector<Ends>& ends) { SealChecked(id, lease, keys, ends, done); });
}

void ContextService::SealChecked(ContextId id, const Lease& lease, std::vector<PrefixKey> keys,
                                 const std::vector<Result<std::optional<uint32_t>>>& ends,
                                 Done done) {
  std::optional<uint32_t> end;
  for (size_t i = 0; i < ends.size(); ++i) {
    if (!ends[i].ok()) return done(ends[i].status());
    if (!ends[i]->has_value()) continue;
    if (end && **ends[i] != *end) {
      return done(FailedPrecondition("seal: shard " + std::to_string(i) + " holds " +
                                     std::to_string(**ends[i]) + " tokens and another one " +
                                     std::to_string(*end) +
                                     "; send the missing rows of all layers first"));
    }
    end = **ends[i];
  }
  if (!leases_.Alive(lease.epoch)) return done(Cancelled("seal: the lease ended"));
  // A fork whose rows end where they began: the shards see the same and keep no segment of it.
  const ContextRecord* record = table_.Find(id);
  const bool added_nothing =
      record != nullptr && record->chain.size() > 1 && end == record->tokens - record->tail_tokens;
  using Sealed = Result<std::optional<SegmentEnds>>;
  shards_.Gather<Sealed>([id, end](Shard& shard) { return shard.SealContext(id, end); },
                         [this, id, added_nothing, keys = std::move(keys),
                          done = std::move(done)](const std::vector<Sealed>& sealed) {
                           FinishSeal(id, added_nothing, keys, sealed, done);
                         });
}

void ContextService::FinishSeal(ContextId id, bool added_nothing,
                                const std::vector<PrefixKey>& keys,
                                const std::vector<Result<std::optional<SegmentEnds>>>& ends,
                                const Done& done) {
  std::optional<SegmentEnds> all;
  for (const auto& of_shard : ends) {
    // Seal may be repeated: shards that have sealed say so again.
    if (!of_shard.ok()) return done(of_shard.status());
    if (!of_shard->has_value()) continue;
    if (all && !(*all == **of_shard)) {
      return done(Internal("seal: shards disagree on where the segment ends; drop the context"));
    }
    all = **of_shard;
  }
  const ContextRecord* record = table_.Find(id);
  if (record == nullptr) return done(Cancelled("seal: the context was dropped"));
  if (!record->sealed && added_nothing) {
    table_.MarkSealedEmpty(id);
  } else if (!record->sealed) {
    const uint32_t end = all ? all->end : 0;
    table_.MarkSealed(id, end, end - (all ? all->tail_first : 0));
  }
  if (Status status = table_.SetPrefix(id, keys); !status.ok()) return done(status);
  done(wire::Done{});
}

Result<ContextRecord> ContextService::OfTenant(const Caller& caller, ContextId id) const {
  const ContextRecord* record = table_.Find(id);
  if (record != nullptr && record->tenant == caller.tenant) return *record;
  return NotFound("context " + std::to_string(id.value) + ": there is none of this tenant");
}

void ContextService::Do(const Caller& caller, const wire::Publish& request, Done done) {
  // Not its creator's alone: an operator keeps what a worker has sealed.
  Result<ContextRecord> record = OfTenant(caller, request.context);
  if (!record.ok()) return done(record.status());
  const Tenant& tenant = tenants_.Get(caller.tenant);
  if (!tenant.rights.share) {
    return done(PermissionDenied("tenant '" + tenant.name + "' has no right to share"));
  }
  // What is on disk says whether it is shared; what is on its way there has not been acknowledged.
  const bool newly_shared = request.shared && !record->shared;
  const bool on_disk = record->durable && !newly_shared && !committing_.contains(record->id);
  if ((request.durable || record->durable) && !on_disk) {
    return PublishDurable(*record, request.shared, std::move(done));
  }
  if (Status status = table_.Publish(record->id, request.shared); !status.ok()) {
    return done(status);
  }
  LogInfo("context published", {{"tenant", tenant.name},
                                {"context", record->name},
                                {"tokens", std::to_string(record->tokens)}});
  done(wire::Done{});
}

void ContextService::Do(const Caller& caller, const wire::Release& request, Done done) {
  std::vector<Lease> ended;
  while (std::optional<Lease> lease = leases_.Find(caller.connection, request.context)) {
    ended.push_back(*leases_.End(lease->epoch));
  }
  if (ended.empty()) {
    return done(NotFound("release: this connection holds no lease on context " +
                         std::to_string(request.context.value)));
  }
  EndLeases(ended, "released");
  // The answer comes after the shards have freed what went with the lease.
  shards_.Gather<bool>([](Shard&) { return true; },
                       [done = std::move(done)](const std::vector<bool>&) { done(wire::Done{}); });
}

void ContextService::Do(const Caller& caller, const wire::Drop& request, Done done) {
  const Tenant& tenant = tenants_.Get(caller.tenant);
  if (!tenant.rights.write) {
    return done(PermissionDenied("tenant '" + tenant.name + "' has no right to write"));
  }
  const ContextRecord* record = table_.FindByName(caller.tenant, request.name);
  if (record == nullptr) return done(NotFound("drop: no context '" + request.name + "'"));
  LogInfo("context dropped", {{"tenant", tenant.name}, {"context", record->name}});
  RememberEnd(*record, "it was dropped");
  DropContext(record->id, [done = std::move(done)](const Status& status) {
    if (status.ok()) return done(wire::Done{});
    done(status.WithContext(
        "drop: gone from memory; its record on disk goes when it can be written, and brings the "
        "context back if the server ends before"));
  });
}

void ContextService::Do(const Caller& caller, const wire::List&, Done done) {
  Describe(table_.List(caller.tenant),
           [done = std::move(done)](std::vector<wire::ContextInfo> contexts) {
             done(wire::ContextList{std::move(contexts)});
           });
}

void ContextService::Do(const Caller& caller, const wire::Describe& request, Done done) {
  const Status gone = NotFound("describe: no context '" + request.name + "'");
  const ContextRecord* record = table_.FindByName(caller.tenant, request.name);
  if (record == nullptr) return done(gone);
  Describe({*record}, [gone, done = std::move(done)](std::vector<wire::ContextInfo> contexts) {
    if (contexts.empty()) return done(gone);  // ended while the shards were asked
    done(wire::ContextList{std::move(contexts)});
  });
}

void ContextService::Do(const Caller& caller, const wire::Renew&, Done done) {
  leases_.Renew(caller.connection);
  done(wire::Done{});
}

void ContextService::Do(const Caller&, const wire::Hello&, Done done) {
  done(InvalidArgument("hello was said already on this connection"));
}

void ContextService::EndLeases(const std::vector<Lease>& ended, const char* reason) {
  for (const Lease& lease : ended) {
    metrics_
        .GetCounter("icecache_leases_ended_total", "Leases that ended, by reason.",
                    {{"reason", reason}})
        .Add();
    shards_.Tell([epoch = lease.epoch](Shard& shard) { shard.EndLease(epoch); });
    const ContextRecord* record = table_.Find(lease.context);
    if (record == nullptr || record->published) continue;
    LogInfo("context dropped with its lease", {{"context", record->name},
                                               {"reason", reason},
                                               {"epoch", std::to_string(lease.epoch.value)}});
    RememberEnd(*record, "it was not published and its lease ended: " + std::string(reason));
    DropContext(lease.context);
  }
  CountGauges();
}

void ContextService::DropContext(ContextId id, std::function<void(Status)> done) {
  for (const Lease& lease : leases_.EndContext(id)) {
    metrics_
        .GetCounter("icecache_leases_ended_total", "Leases that ended, by reason.",
                    {{"reason", "dropped"}})
        .Add();
    shards_.Tell([epoch = lease.epoch](Shard& shard) { shard.EndLease(epoch); });
  }
  const ContextRecord* found = table_.Find(id);
  if (found == nullptr) return;
  const bool durable = found->durable && store_ != nullptr;
  const ContextManifest manifest = durable ? ManifestOf(*found) : ContextManifest{};
  const std::vector<SegmentId> freed = *table_.Remove(id);
  shards_.Gather<bool>(
      [id](Shard& shard) {
        shard.DropContext(id);
        return true;
      },
      [this, durable, manifest, freed, done = std::move(done)](const std::vector<bool>&) {
        // The shards write no part of the segments any more.
        if (durable) return store_->Forget(manifest, freed, done);
        if (store_ != nullptr) store_->DeleteSegments(freed);
        if (done) done(OkStatus());
      });
}

void ContextService::EndConnection(ConnectionId connection) {
  frames_.EndConnection(connection);
  EndLeases(leases_.EndConnection(connection), "disconnected");
}

void ContextService::Do(const Caller& caller, const wire::ShareFrames& request, const Done& done) {
  const Tenant& tenant = tenants_.Get(caller.tenant);
  if (!tenant.rights.read) {
    return done(PermissionDenied("tenant '" + tenant.name + "' has no right to read"));
  }
  Result<wire::SharedFramesList> others = frames_.Share(caller.tenant, caller.connection, request);
  if (!others.ok()) return done(others.status());
  done(*std::move(others));
}

void ContextService::Do(const Caller& caller, const wire::Drain&, Done done) {
  const Tenant& tenant = tenants_.Get(caller.tenant);
  if (!tenant.rights.admin) {
    return done(PermissionDenied("tenant '" + tenant.name +
                                 "' has no right to drain the server; it takes \"admin\""));
  }
  LogInfo("drain asked for", {{"tenant", tenant.name}});
  done(wire::Done{});
  if (hooks_.drain) hooks_.drain();
}

void ContextService::Sweep() {
  EndLeases(leases_.EndExpired(), "expired");
  merger_.Turn();
  CountGauges();
}

void ContextService::ApplyQuotas() {
  for (const Tenant& tenant : tenants_.all()) {
    // Heads are spread evenly over the shards, so each gets an equal part; rounding down keeps the
    // sum within the quota.
    const uint64_t part =
        tenant.quota_bytes == 0 ? 0 : std::max<uint64_t>(1, tenant.quota_bytes / shards_.size());
    shards_.Tell([id = tenant.id, part, weight = tenant.weight](Shard& shard) {
      shard.SetQuota(id, part);
      shard.SetWeight(id, weight);
    });
  }
}

}  // namespace icecache
