#include "cacheserver/shard_merge.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/limits.h"
#include "common/size.h"

namespace icecache {

struct ShardMerge::Merge {
  std::unique_ptr<SegmentMerge> work;     // nullptr once it is done
  std::shared_ptr<const Segment> merged;  // then
  SegmentId id;
  TenantId tenant;
  Done done;  // empty once answered
};

ShardMerge::ShardMerge(Reactor& reactor, PagePool& pool, Tier& tier, BuildPool& builds,
                       TenantWork& work, std::function<bool()> busy)
    : reactor_(reactor),
      pool_(pool),
      tier_(tier),
      builds_(builds),
      work_(work),
      busy_(std::move(busy)) {}

ShardMerge::~ShardMerge() = default;

// What a merge of this size may take now.
Status ShardMerge::CheckRoom(const SegmentMerge& merge) const {
  const uint64_t need = merge.kv_bytes();
  const PoolUsage pool = pool_.usage();
  if (need > pool.memory_bytes / limits::kMergeMemoryShare) {
    return ResourceExhausted("merge: " + FormatSize(need) + ", at most 1/" +
                             std::to_string(limits::kMergeMemoryShare) +
                             " of a shard's memory of " + FormatSize(pool.memory_bytes));
  }
  if (tier_.evicts()) return OkStatus();  // it makes room, of what is used least
  const auto check = [need](uint64_t all, uint64_t used, const char* what) {
    const uint64_t spare = need + all / limits::kMergeMemoryShare;
    if (used <= all && spare <= all - used) return OkStatus();
    return ResourceExhausted(std::string("merge: ") + what + " has not " + FormatSize(spare) +
                             " to spare");
  };
  KV_RETURN_IF_ERROR(
      check(pool.memory_bytes, pool.frame_bytes + pool.row_bytes, "the shard's memory"));
  const TenantUsage tenant = pool_.usage(merge.spec().tenant);
  if (tenant.quota_bytes == 0) return OkStatus();
  return check(tenant.quota_bytes, tenant.frame_bytes + tenant.row_bytes, "the tenant's quota");
}

void ShardMerge::Start(std::vector<std::shared_ptr<const Segment>> run, SegmentId merged,
                       Done done) {
  if (merge_ != nullptr || lent_ != nullptr) {
    return done(Unavailable("merge: the shard is at another one"));
  }
  merge_ = std::make_shared<Merge>();
  merge_->work = std::make_unique<SegmentMerge>(pool_, std::move(run), merged);
  merge_->id = merged;
  merge_->tenant = merge_->work->spec().tenant;
  merge_->done = std::move(done);
  Step(std::shared_ptr<Merge>(merge_));
}

void ShardMerge::Step(const std::shared_ptr<Merge>& merge) {
  if (merge != merge_) return;  // dropped
  if (merge->work->done()) return Finish(merge);
  const auto later = [this, merge, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) Step(merge);
  };
  if (busy_()) return (void)reactor_.After(limits::kMergePause, later);
  const TenantWork::Meter meter(work_, merge->tenant);
  Misses misses;
  Status status = CheckRoom(*merge->work);
  if (status.ok()) {
    Result<std::unique_ptr<SliceJob>> job = merge->work->Prepare(&misses);
    status = job.status();
    if (status.ok() && *job != nullptr) return Run(merge, std::move(*job));
  }
  if (!status.ok()) return End(merge, status);
  // What it brings is held until it has been looked at again, in this very call.
  tier_.Load(misses, [this, merge, alive = std::weak_ptr<int>(alive_)](const Status& loaded) {
    if (alive.expired()) return;
    if (!loaded.ok()) return End(merge, loaded);
    Step(merge);
  });
}

void ShardMerge::Run(const std::shared_ptr<Merge>& merge, std::unique_ptr<SliceJob> job) {
  KV_CHECK(lent_ == nullptr);
  lent_ = std::move(job);
  builds_.Submit(merge->tenant, [this, id = merge->id, lent = lent_.get(), &reactor = reactor_,
                                 alive = std::weak_ptr<int>(alive_)] {
    lent->Run();
    reactor.Post([this, id, alive] {
      if (!alive.expired()) Install(id);
    });
  });
}

void ShardMerge::Install(SegmentId id) {
  std::unique_ptr<SliceJob> job = std::exchange(lent_, nullptr);
  const std::shared_ptr<Merge> merge = merge_;
  if (merge == nullptr || merge->id != id) return;  // dropped
  const TenantWork::Meter meter(work_, merge->tenant);
  if (Status status = merge->work->Install(std::move(job)); !status.ok()) return End(merge, status);
  Step(merge);
}

void ShardMerge::Finish(const std::shared_ptr<Merge>& merge) {
  merge->merged = merge->work->Take();
  merge->work.reset();  // the old segments are their contexts' alone again
  tier_.Add(merge->merged, false);
  std::exchange(merge->done, {})(OkStatus());
}

void ShardMerge::End(std::shared_ptr<Merge> merge, const Status& status) {
  if (merge != merge_) return;
  merge_ = nullptr;
  if (merge->done) std::exchange(merge->done, {})(status);
}

std::shared_ptr<const Segment> ShardMerge::Take(SegmentId merged) {
  if (merge_ == nullptr || merge_->id != merged) return nullptr;
  return std::exchange(merge_, nullptr)->merged;
}

void ShardMerge::Drop(SegmentId merged) {
  if (merge_ != nullptr && merge_->id == merged) End(merge_, Cancelled("merge: it was given up"));
}

}  // namespace icecache
