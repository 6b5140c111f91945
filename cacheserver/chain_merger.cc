#include "cacheserver/chain_merger.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

Counter& Merges(MetricsRegistry& metrics, const char* result) {
  return metrics.GetCounter("icecache_merges_total",
                            "Background merges of small sealed segments, by result.",
                            {{"result", result}});
}

}  // namespace

ChainMerger::ChainMerger(ShardGroup& shards, ContextTable& table, ContextStore* store,
                         const Clock& clock, MetricsRegistry& metrics, Hooks hooks)
    : shards_(shards),
      table_(table),
      store_(store),
      clock_(clock),
      hooks_(std::move(hooks)),
      done_(Merges(metrics, "done")),
      abandoned_(Merges(metrics, "abandoned")),
      segments_(metrics.GetCounter("icecache_segments_merged_total",
                                   "Segments that were put together in others.")),
      seconds_(metrics.GetHistogram("icecache_merge_seconds",
                                    "From the start of a merge to its exchange in all chains.")) {}

void ChainMerger::Turn() {
  if (running_) {
    if (!running_->waits && clock_.Now() >= running_->retry) Advance();
    return;
  }
  if (tokens_max_ == 0 || clock_.Now() < next_look_) return;
  Look();
}

void ChainMerger::Look() {
  const TimePoint now = clock_.Now();
  next_look_ = now + limits::kMergeInterval;
  std::erase_if(ready_, [this](const auto& entry) { return !table_.FindSegment(entry.first); });
  const std::optional<MergeChoice> choice =
      table_.ChooseMerge(tokens_max_, [this, now](SegmentId last) {
        const Ready fresh{now + limits::kMergeQuietTime};
        return now >= ready_.try_emplace(last, fresh).first->second.at;
      });
  if (choice) Start(*choice);
}

void ChainMerger::Start(const MergeChoice& choice) {
  running_ = Running{.what = {choice.run, table_.NewSegmentId()}, .started = clock_.Now()};
  shards_.GatherLater<Status>(
      [context = choice.context, what = running_->what](Shard& shard,
                                                        std::function<void(Status)> answer) {
        shard.MergeSegments(context, what.run, what.merged, std::move(answer));
      },
      [this, merged = running_->what.merged](const std::vector<Status>& built) {
        if (!Is(merged)) return;
        if (Status status = FirstError(built); !status.ok()) return Abandon(status);
        running_->built = true;
        Advance();
      });
}

// The next thing that is left to do; comes back after each, since contexts come and go meanwhile.
void ChainMerger::Advance() {
  running_->waits = false;
  const std::vector<ContextId> holders = table_.HoldersOf(running_->what.run);
  if (holders.empty()) return Abandon(Cancelled("merge: no chain holds the segments any more"));
  const auto durable = [this](ContextId id) { return table_.Find(id)->durable; };
  if (!running_->stored && std::any_of(holders.begin(), holders.end(), durable)) return Store();
  // Else the next turn looks again.
  if (std::any_of(holders.begin(), holders.end(), hooks_.busy)) return;
  for (const ContextId id : holders) {
    if (durable(id) && !running_->committed.contains(id)) return Commit(id);
  }
  Exchange();
}

void ChainMerger::Store() {
  running_->waits = true;
  shards_.GatherLater<Status>(
      [merged = running_->what.merged](Shard& shard, std::function<void(Status)> answer) {
        shard.tier().Store(merged, std::move(answer));
      },
      [this, merged = running_->what.merged](const std::vector<Status>& stored) {
        if (!Is(merged)) return;
        if (Status status = FirstError(stored); !status.ok()) return Abandon(status);
        running_->stored = true;
        Advance();
      });
}

void ChainMerger::Commit(ContextId context) {
  running_->waits = true;
  hooks_.commit(context, running_->what,
                [this, context, merged = running_->what.merged](const Status& status) {
                  if (!Is(merged)) return;
                  running_->waits = false;
                  if (status.ok()) {
                    running_->committed.insert(context);
                    return Advance();
                  }
                  // It may be on the disk all the same.
                  LogWarn("merge: record not written", {{"status", status.ToString()}});
                  running_->retry = clock_.Now() + limits::kStoreRetryTime;
                });
}

void ChainMerger::Recommitted(ContextId context) {
  if (running_) running_->committed.erase(context);
}

void ChainMerger::Exchange() {
  const Running merge = std::move(*std::exchange(running_, std::nullopt));
  const SegmentId first = merge.what.run.front(), last = merge.what.run.back();
  const std::vector<SegmentId> freed = table_.Merge(merge.what.run, merge.what.merged);
  shards_.Gather<bool>(
      [first, last, merged = merge.what.merged](Shard& shard) {
        shard.ReplaceRun(first, last, merged);
        return true;
      },
      [this, freed](const std::vector<bool>&) {
        // The shards write no part of them any more.
        if (store_ != nullptr) store_->DeleteSegments(freed);
      });
  done_.Add();
  segments_.Add(merge.what.run.size());
  const Duration took = clock_.Now() - merge.started;
  seconds_.ObserveSeconds(std::chrono::duration<double>(took).count());
  const SegmentRecord segment = *table_.FindSegment(merge.what.merged);
  LogInfo("segments merged", {{"segments", std::to_string(merge.what.run.size())},
                              {"into", std::to_string(merge.what.merged.value)},
                              {"tokens", std::to_string(segment.tokens())},
                              {"contexts", std::to_string(segment.references)}});
  if (tokens_max_ > 0) Look();
}

void ChainMerger::Abandon(const Status& why) {
  const MergedRun what = std::move(std::exchange(running_, std::nullopt)->what);
  shards_.Gather<bool>(
      [merged = what.merged](Shard& shard) {
        shard.DropMerge(merged);
        return true;
      },
      [this, merged = what.merged](const std::vector<bool>&) {
        if (store_ != nullptr) store_->DeleteSegments({merged});
      });
  Ready& ready = ready_[what.run.back()];
  ready.wait =
      std::clamp<Duration>(2 * ready.wait, limits::kMergeBackoffMin, limits::kMergeBackoffMax);
  ready.at = clock_.Now() + ready.wait;
  abandoned_.Add();
  LogInfo("merge given up",
          {{"segments", std::to_string(what.run.size())}, {"reason", why.ToString()}});
}

void ChainMerger::Stop() {
  tokens_max_ = 0;
  if (running_ && !running_->built) Abandon(Cancelled("the server is draining"));
}

}  // namespace icecache
