// ChainMerger: keeps chains short in the background: finds runs of small sealed segments, has every
// shard build one segment of them, and exchanges it in all chains that hold the run
// (docs/adr/0019-merging-segments.md).
//
//   Turn* -> found, and there for kMergeQuietTime -> shards build -> [durable: stored, and the
//   record of every durable context written anew] -> exchanged, the old segments go
// One merge at a time. A build that fails, or a run that nobody holds any more, leaves nothing, and
// the run is left alone for a while that doubles. A record that cannot be written is tried again:
// until it is, what it may name stays, old and new. Requests see one chain or the other, with the
// same tokens.
//
// Owned by ContextService. Thread: control.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "cacheserver/context/context_table.h"
#include "cacheserver/context_store.h"
#include "cacheserver/shard_group.h"
#include "common/clock.h"
#include "common/metrics.h"

namespace icecache {

// A run of a chain and what takes its place.
struct MergedRun {
  std::vector<SegmentId> run;
  SegmentId merged;
};

class ChainMerger {
 public:
  struct Hooks {
    // Writes the record of a durable context as it will be after the exchange.
    std::function<void(ContextId, const MergedRun&, std::function<void(Status)>)> commit;
    // Its record is on its way to the disk, or it is being read from there.
    std::function<bool(ContextId)> busy;
  };
  // Borrows all; store: nullptr when there is none.
  ChainMerger(ShardGroup& shards, ContextTable& table, ContextStore* store, const Clock& clock,
              MetricsRegistry& metrics, Hooks hooks);
  ChainMerger(const ChainMerger&) = delete;
  ChainMerger& operator=(const ChainMerger&) = delete;

  // Largest merged segment, in tokens; 0, as at first: nothing is merged.
  void SetTokensMax(uint32_t tokens) { tokens_max_ = tokens; }
  // What is due; as often as you like.
  void Turn();
  // Starts none from now on, and gives up one that is being built.
  void Stop();
  // The record of the context has been written with the chain that it has now.
  void Recommitted(ContextId context);

 private:
  struct Running {
    MergedRun what;
    TimePoint started;
    bool waits = true;              // for an answer
    bool built = false;             // on all shards
    bool stored = false;            // likewise, on disk
    TimePoint retry{};              // of a record that could not be written
    std::set<ContextId> committed;  // contexts whose record names the new segment
  };
  // When a run that ends in a segment may be merged.
  struct Ready {
    TimePoint at;
    Duration wait{};  // after the last try
  };

  void Look();
  void Start(const MergeChoice& choice);
  bool Is(SegmentId merged) const { return running_ && running_->what.merged == merged; }
  void Advance();
  void Store();
  void Commit(ContextId context);
  void Exchange();
  void Abandon(const Status& why);

  ShardGroup& shards_;
  ContextTable& table_;
  ContextStore* const store_;
  const Clock& clock_;
  const Hooks hooks_;
  Counter& done_;
  Counter& abandoned_;
  Counter& segments_;
  Histogram& seconds_;
  uint32_t tokens_max_ = 0;
  TimePoint next_look_{};
  std::optional<Running> running_;
  std::map<SegmentId, Ready> ready_;  // sealed segments that a look has seen
};

}  // namespace icecache
