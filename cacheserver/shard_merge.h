// ShardMerge: what one shard does to merge segments: builds the new one, a slice at a time on the
// build threads, and keeps it until the control plane takes or drops it. At most one at a time.
//
//   Start -> done(OK) -> Take
//         -> done(an error): nothing is left of it
//   Drop  at any time
// Clustering waits while the shard has other clustering to do. It takes memory that is to spare: at
// most 1 / kMergeMemoryShare of the shard's, and without a cold store it leaves as much free again,
// of the shard's memory and of the owner's quota. Time is charged to the owner of the segments.
//
// Owned by the Shard; its thread. Ends after BuildPool::Stop.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cacheserver/build_pool.h"
#include "cacheserver/context/segment_merge.h"
#include "cacheserver/tenant_work.h"
#include "cacheserver/tier.h"
#include "common/reactor.h"

namespace icecache {

class ShardMerge {
 public:
  // Borrows all. busy: whether the shard clusters something else now.
  ShardMerge(Reactor& reactor, PagePool& pool, Tier& tier, BuildPool& builds, TenantWork& work,
             std::function<bool()> busy);
  ~ShardMerge();
  ShardMerge(const ShardMerge&) = delete;
  ShardMerge& operator=(const ShardMerge&) = delete;

  // As SegmentMerge. RESOURCE_EXHAUSTED: no memory to spare; UNAVAILABLE: another one is under way;
  // CANCELLED: it was dropped; what Tier::Load says. Answers once.
  using Done = std::function<void(Status)>;
  void Start(std::vector<std::shared_ptr<const Segment>> run, SegmentId merged, Done done);
  // The new segment, sealed and known to the tier, which ends the merge; nullptr: it is not there.
  std::shared_ptr<const Segment> Take(SegmentId merged);
  void Drop(SegmentId merged);  // absent: nothing

 private:
  struct Merge;
  void Step(const std::shared_ptr<Merge>& merge);
  void Run(const std::shared_ptr<Merge>& merge, std::unique_ptr<SliceJob> job);
  void Install(SegmentId merged);
  void Finish(const std::shared_ptr<Merge>& merge);
  void End(std::shared_ptr<Merge> merge, const Status& status);  // a copy: it resets merge_
  Status CheckRoom(const SegmentMerge& merge) const;

  Reactor& reactor_;
  PagePool& pool_;
  Tier& tier_;
  BuildPool& builds_;
  TenantWork& work_;
  const std::function<bool()> busy_;
  std::shared_ptr<Merge> merge_;    // nullptr: none
  std::unique_ptr<SliceJob> lent_;  // to a build thread
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
