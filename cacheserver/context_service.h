// ContextService: what the control plane does, without its sockets. Create, open, fork, seal,
// publish, release, drop, list, describe and renew, over the context table, the leases and the
// shards.
//
// Every change goes to the shards before it is answered, in the order of the requests: a worker
// that holds a grant finds its context and its ticket on every shard. A lease that ends (released,
// expired, its connection gone, its context dropped) is void here at once and on the shards as soon
// as they turn; an unpublished context goes with its lease. Thread: control.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cacheserver/chain_merger.h"
#include "cacheserver/context/context_table.h"
#include "cacheserver/context/frame_table.h"
#include "cacheserver/context/lease_table.h"
#include "cacheserver/context/tenant.h"
#include "cacheserver/shard_group.h"
#include "common/metrics.h"
#include "common/wire/control_codec.h"

namespace icecache {

using ControlRequestBody = decltype(wire::ControlRequest::body);
using ControlReplyBody = decltype(wire::ControlReply::body);

// Everything /status says about contexts; gathered from the shards.
struct ContextReport {
  std::vector<wire::ContextInfo> contexts;  // by tenant, then name
  uint64_t segments = 0;
  uint64_t kv_bytes = 0;  // of distinct segments
  uint64_t index_bytes = 0;
};

// What reports say of connections, and what a drain does; the server fills it in.
struct ServerHooks {
  std::function<void()> drain;
  std::function<std::string(ConnectionId)> peer;  // "127.0.0.1:5000 icecache-worker"
};

class ContextService {
 public:
  // store: the cold store, nullptr when there is none. first_segment: as ContextTable.
  ContextService(ShardGroup& shards, TenantTable& tenants, LeaseTable& leases,
                 MetricsRegistry& metrics, ContextStore* store = nullptr,
                 uint64_t first_segment = 1);
  ContextService(const ContextService&) = delete;
  ContextService& operator=(const ContextService&) = delete;

  // Answers once, now or on a later turn; a Status is an error. Hello is not for here
  // (INVALID_ARGUMENT).
  using Done = std::function<void(ControlReplyBody)>;
  void Handle(ConnectionId connection, TenantId tenant, const ControlRequestBody& request,
              Done done);

  void EndConnection(ConnectionId connection);
  void Renew(ConnectionId connection) { leases_.Renew(connection); }
  // Ends leases that have expired and does what merging is due. Every second or oftener.
  void Sweep();
  void SetMergeTokens(uint32_t tokens) { merger_.SetTokensMax(tokens); }
  void SetHooks(ServerHooks hooks) { hooks_ = std::move(hooks); }
  // Create, open and fork answer UNAVAILABLE from now on.
  void StopAdmitting() {
    admitting_ = false;
    merger_.Stop();
  }
  // Sends the tenants' quotas to the shards: at start and after a reload.
  void ApplyQuotas();

  // Offers a context that was found in the cold store; it is read when somebody opens it. Before the
  // first request. NOT_FOUND: its tenant is not in the token file (it stays on disk).
  Status Recover(const ContextManifest& manifest);

  void Report(std::function<void(ContextReport)> done);
  uint32_t lease_count() const { return leases_.count(); }
  uint32_t context_count() const { return table_.count(); }

 private:
  struct Caller {
    ConnectionId connection;
    TenantId tenant;
  };
  void Do(const Caller& caller, const wire::Create& request, Done done);
  void Do(const Caller& caller, const wire::Open& request, Done done);
  // context_fork.cc
  void Do(const Caller& caller, const wire::Fork& request, Done done);
  void Do(const Caller& caller, const wire::MatchPrefix& request, const Done& done);
  Result<ContextRecord> ForkParent(const Caller& caller, const wire::Fork& request) const;
  void Do(const Caller& caller, const wire::Seal& request, Done done);
  void Do(const Caller& caller, const wire::Publish& request, Done done);
  void Do(const Caller& caller, const wire::Release& request, Done done);
  void Do(const Caller& caller, const wire::Drop& request, Done done);
  void Do(const Caller& caller, const wire::List& request, Done done);
  void Do(const Caller& caller, const wire::Describe& request, Done done);
  void Do(const Caller& caller, const wire::Renew& request, Done done);
  void Do(const Caller& caller, const wire::Hello& request, Done done);
  void Do(const Caller& caller, const wire::Drain& request, Done done);
  void Do(const Caller& caller, const wire::ShareFrames& request, const Done& done);
  // context_inspect.cc
  void Do(const Caller& caller, const wire::Inspect& request, Done done);
  void ReportTenants(const Caller& caller, Done done);
  void ReportLeases(const Caller& caller, const Done& done);
  void Explain(const Caller& caller, const std::string& name, Done done);
  void Verify(const Caller& caller, const std::string& name, Done done);
  std::string WhyGone(TenantId tenant, const std::string& name) const;
  std::string WhyThere(const ContextRecord& record) const;
  void RememberEnd(const ContextRecord& record, std::string reason);

  Status CheckAdmit(const Caller& caller, bool write) const;
  // Leases the new record, makes it on the shards through `make`, grants it.
  using Make = std::function<void(Shard&, std::function<void(Status)>)>;
  void Admit(const Caller& caller, const ContextRecord& record, Make make, Done done);
  void FinishGrant(const Lease& lease, std::vector<Holdings> holdings, const Done& done);
  void SealChecked(ContextId id, const Lease& lease, std::vector<PrefixKey> keys,
                   const std::vector<Result<std::optional<uint32_t>>>& ends, Done done);
  void FinishSeal(ContextId id, bool added_nothing, const std::vector<PrefixKey>& keys,
                  const std::vector<Result<std::optional<SegmentEnds>>>& ends, const Done& done);
  // Calls then(OK) when the shards know the context, which may take a read from the cold store.
  void WithLoaded(ContextId id, std::function<void(Status)> then);
  void RestoreOnShards(ContextId id, const std::shared_ptr<const ContextStore::Rows>& rows);
  void FinishLoading(ContextId id, const Status& status);
  void PublishDurable(const ContextRecord& record, bool shared, Done done);
  void Commit(ContextId id, bool shared, const Done& done);
  void FinishCommit(ContextId id, bool shared, bool was_durable, const Status& status,
                    const Done& done);
  void CommitMerged(ContextId id, const MergedRun& merge, std::function<void(Status)> done);
  ContextManifest ManifestOf(const ContextRecord& record) const;
  ContextSpec SpecOf(const ContextRecord& record) const;
  void GrantRead(const Caller& caller, ContextId id, const Done& done);
  void GrantFork(const Caller& caller, ContextId parent, const wire::Fork& request, Done done);
  // The record of a context that the caller holds a writable lease on.
  Result<ContextRecord> Owned(const Caller& caller, ContextId id) const;
  Result<ContextRecord> OfTenant(const Caller& caller, ContextId id) const;
  wire::ContextInfo Info(const ContextRecord& record, const std::vector<Holdings>& holdings) const;
  void Describe(std::vector<ContextRecord> records,
                std::function<void(std::vector<wire::ContextInfo>)> done);
  void EndLeases(const std::vector<Lease>& ended, const char* reason);
  // done: OK when nothing of it can come back; otherwise why its record is still on disk. May be
  // empty.
  void DropContext(ContextId id, std::function<void(Status)> done = {});
  void CountGauges();

  ShardGroup& shards_;
  TenantTable& tenants_;
  LeaseTable& leases_;
  MetricsRegistry& metrics_;
  Gauge& lease_gauge_;
  Gauge& context_gauge_;
  Gauge& segment_gauge_;
  Gauge& sharing_gauge_;
  Counter& prefix_hits_;
  Counter& prefix_misses_;
  Counter& prefix_tokens_;
  ContextStore* const store_;
  ContextTable table_;
  FrameTable frames_;
  ChainMerger merger_;
  ServerHooks hooks_;
  struct Ended {
    TenantId tenant;
    std::string name, reason;
    TimePoint when;
  };
  const TimePoint started_ = leases_.clock().Now();
  std::deque<Ended> ended_;  // contexts that are gone, the last at the end
  std::map<ContextId, std::vector<std::function<void(Status)>>> loading_;
  // Contexts whose record is on its way to the disk, and publications that wait for the outcome.
  std::map<ContextId, std::vector<std::function<void()>>> committing_;
  bool admitting_ = true;
};

// "create"; for logs and metrics.
const char* ControlRequestName(const ControlRequestBody& request);

}  // namespace icecache
