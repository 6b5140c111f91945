// Shard: the contexts, memory and leases of one thread.
//
// Owns the thread's PagePool and its part of every context. The control plane calls in by posting
// to the shard's reactor (ContextService); the data plane calls directly (DataService, same
// thread). A request is served only under a lease that the control plane has put here and not taken
// back: that is the fence.
//
// Clustering runs on the BuildPool: the shard keeps each job, lends it to a pool thread, and
// installs it when it comes back. A context may be dropped meanwhile; the result is then thrown
// away here, on this thread.
//
// Lifecycle: 1. made on any thread -> 2. used on its reactor's thread -> 3. destroyed there, after
// BuildPool::Stop.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cacheserver/build_pool.h"
#include "cacheserver/context/context.h"
#include "cacheserver/context/lease_table.h"
#include "cacheserver/context_store.h"
#include "cacheserver/shard_merge.h"
#include "cacheserver/shard_report.h"
#include "cacheserver/store/page_pool.h"
#include "cacheserver/tenant_work.h"
#include "cacheserver/tier.h"
#include "common/metrics.h"
#include "common/reactor.h"

namespace icecache {

struct ShardOptions {
  ShardId id;
  uint32_t count = 1;  // shards of the server
  uint64_t memory_bytes = 0;
};

// A child of a sealed context (ForkPlan): its first `keep` segments are the parent's; then comes a
// cut of the parent's next one, if any; then the child's own.
struct ForkSpec {
  ContextId parent, child;
  TenantId tenant;
  SegmentId segment;  // the child's own
  uint32_t keep = 0;
  std::optional<std::pair<SegmentId, SegmentEnds>> cut;
};

class Shard {
 public:
  // All borrowed things outlive the shard; `cold` may be nullptr.
  Shard(const ShardOptions& options, Reactor& reactor, BuildPool& builds, MetricsRegistry& metrics,
        ColdPool* cold = nullptr);
  ~Shard();
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  // For the control plane. Ids are unique on the server and never used again.
  // spec.shard and spec.shard_count are filled in here. RESOURCE_EXHAUSTED, INVALID_ARGUMENT.
  Status CreateContext(ContextSpec spec);
  // The child takes shape, policy and sizes from its parent. Answers at once, or, when something is
  // cut, on a later turn (shard_chains.cc). CANCELLED: the child was dropped meanwhile.
  void ForkContext(const ForkSpec& fork, std::function<void(Status)> done);
  // A sealed context from the cold store: spec and chain describe it, rows are those of the chain's
  // segments. Segments that this shard holds already are shared. Harmless when repeated.
  Status RestoreContext(ContextSpec spec, std::span<const SegmentSpec> chain,
                        std::span<const SegmentEnds> ends, const ContextStore::Rows& rows);
  // Builds one segment of this run of the context's chain (ShardMerge::Start; NOT_FOUND: it is not
  // there), and puts it in the place of [first, last] in every chain, or drops it.
  void MergeSegments(ContextId context, std::span<const SegmentId> run, SegmentId merged,
                     std::function<void(Status)> done);
  void ReplaceRun(SegmentId first, SegmentId last, SegmentId merged);
  void DropMerge(SegmentId merged) { merge_.Drop(merged); }
  // Where the slices of the private segment end if all of them can be sealed now; nullopt when the
  // shard owns none. FAILED_PRECONDITION names the slice that is behind or being built. Changes
  // nothing.
  Result<std::optional<uint32_t>> CheckSealable(ContextId context) const;
  // Harmless when repeated.
  // end: what all shards have answered. FAILED_PRECONDITION when more has come since.
  Result<std::optional<SegmentEnds>> SealContext(ContextId context, std::optional<uint32_t> end);
  void DropContext(ContextId context);  // absent: nothing
  void AddLease(const Lease& lease);
  void EndLease(Epoch epoch);
  void SetQuota(TenantId tenant, uint64_t bytes) { pool_.SetQuota(tenant, bytes); }
  Holdings HoldingsOf(std::span<const ContextId> contexts) const;
  ShardStatus status();
  ContextDetail Detail(ContextId context) const;
  // Reads the pages of these contexts, one slice a turn, each segment once; contexts that are
  // dropped meanwhile are left out.
  void Verify(const std::vector<ContextId>& contexts, std::function<void(VerifyResult)> done);

  // For the data plane. nullptr: absent, valid until the shard next changes leases or contexts.
  const Lease* FindTicket(std::span<const std::byte> ticket) const;
  const Lease* FindLease(Epoch epoch) const;
  Context* FindContext(ContextId context);
  // Clusters one slice and calls done on a later turn or, when the build stands already, at once.
  // The answer is the slice's page count. `proposed`: BuildHints', or null. Where memory is short
  // it waits while sealed segments are stored and pages that others hold come free, until give_up.
  using BuildDone = std::function<void(Result<uint32_t>)>;
  void Build(ContextId context, LayerId layer, KvHeadId head, uint32_t token_count,
             std::span<const float> query_energy, std::shared_ptr<const Packing> proposed,
             BuildDone done, TimePoint give_up = TimePoint::max());
  // Moves pending rows of these slices into the index on later turns, a few at a time, and starts a
  // re-clustering where one is due.
  void IndexLater(ContextId context, LayerId layer, std::span<const KvHeadId> heads);

  void Remember(ContextId context, const SelectionRecord& selection);
  // A tenant's share of this shard and of the build threads under load, relative to others'; 1
  // unless set.
  void SetWeight(TenantId tenant, uint32_t weight) {
    work_.SetWeight(tenant, weight);
    builds_.SetWeight(tenant, weight);
  }

  TenantWork& work() { return work_; }
  PagePool& pool() { return pool_; }
  Tier& tier() { return tier_; }
  const ShardOptions& options() const { return options_; }
  uint64_t jobs() const { return jobs_.size(); }

 private:
  struct SliceName {
    ContextId context;
    LayerId layer;
    KvHeadId head;
  };
  struct Job {
    SliceName slice;
    TenantId tenant;
    std::unique_ptr<SliceJob> work;
    BuildDone done;  // empty: re-clustering
    TimePoint started;
    TimePoint give_up;
  };
  void WhenRoom(const Status& refused, TimePoint give_up, std::function<void(Status)> then);
  void Submit(const Context& context, SliceName slice, std::unique_ptr<SliceJob> work,
              BuildDone done, TimePoint give_up);
  void Finish(uint64_t job);
  void Install(uint64_t job);
  void IndexSome();
  struct ForkJob;
  void CutSome(ContextId child);
  void FinishFork(ContextId child, Status status);
  struct VerifyJob;
  void VerifySome(const std::shared_ptr<VerifyJob>& job);
  void MaybeRecluster(Context& context, const SliceName& slice);

  const ShardOptions options_;
  Reactor& reactor_;
  BuildPool& builds_;
  Counter& rows_indexed_;
  Counter& reclusters_;
  Counter& jobs_failed_;
  Histogram& build_seconds_;

  TenantWork work_;
  PagePool pool_;
  Tier tier_;
  ShardMerge merge_;
  std::unique_ptr<AttentionBackend> attention_;
  std::unordered_map<ContextId, std::unique_ptr<Context>> contexts_;
  std::unordered_map<Epoch, Lease> leases_;
  std::unordered_map<std::string, Epoch> tickets_;
  std::unordered_map<uint64_t, std::unique_ptr<Job>> jobs_;
  std::unordered_map<TenantId, uint32_t> jobs_of_;                 // how many of jobs_
  std::unordered_map<ContextId, std::shared_ptr<ForkJob>> forks_;  // being cut, by child
  std::unordered_map<ContextId, std::deque<SelectionRecord>> selections_;
  Counter& checksum_failures_;
  uint64_t next_job_ = 1;
  uint32_t reclusters_running_ = 0;
  std::deque<SliceName> to_index_;
  bool index_posted_ = false;
  // Work posted to the reactor holds it weakly, so that nothing runs into a destroyed shard.
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
