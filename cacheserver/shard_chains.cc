// What changes chains. Forking, at the end of a context or at an earlier token: then its last segment
// is cut, one slice a turn, and what is not in memory is brought first. Merging: the exchange; the work
// is ShardMerge's.
#include <utility>

#include "cacheserver/context/segment_cut.h"
#include "cacheserver/shard.h"
#include "common/limits.h"

namespace icecache {

struct Shard::ForkJob {
  ContextSpec spec;
  std::vector<std::shared_ptr<const Segment>> chain;  // what the child shares
  std::unique_ptr<SegmentCut> cut;
  std::function<void(Status)> done;
  TimePoint deadline;
};

void Shard::ForkContext(const ForkSpec& fork, std::function<void(Status)> done) {
  const Context* parent = FindContext(fork.parent);
  if (parent == nullptr) {
    return done(NotFound("context " + std::to_string(fork.parent.value) +
                         " is not on this shard; it was dropped"));
  }
  if (!parent->sealed()) return done(FailedPrecondition("fork: the context is not sealed"));
  auto job = std::make_shared<ForkJob>();
  job->spec = parent->spec();
  job->spec.id = fork.child;
  job->spec.segment = fork.segment;
  job->spec.tenant = fork.tenant;
  job->done = std::move(done);
  job->deadline = reactor_.clock().Now() + limits::kForkTime;
  const std::vector<std::shared_ptr<const Segment>>& chain = parent->chain();
  // A shard that owns no slices keeps no count of segments.
  const bool empty = chain.back()->slice_count() == 0;
  KV_CHECK(empty || fork.keep + (fork.cut ? 1 : 0) <= chain.size());
  job->chain.assign(chain.begin(), chain.begin() + std::min<size_t>(fork.keep, chain.size()));
  if (fork.cut && !empty) {
    SegmentSpec spec = chain[fork.keep]->spec();
    spec.id = fork.cut->first;
    spec.tenant = fork.tenant;
    job->cut = std::make_unique<SegmentCut>(pool_, chain, fork.keep, spec, fork.cut->second);
  }
  forks_.emplace(fork.child, std::move(job));
  CutSome(fork.child);
}

void Shard::MergeSegments(ContextId id, std::span<const SegmentId> run, SegmentId merged,
                          std::function<void(Status)> done) {
  const Context* context = FindContext(id);
  if (context == nullptr) return done(NotFound("merge: the context was dropped"));
  std::vector<std::shared_ptr<const Segment>> segments;
  for (const SegmentId wanted : run) {
    for (const std::shared_ptr<const Segment>& segment : context->chain()) {
      if (segment->id() == wanted) segments.push_back(segment);
    }
  }
  if (segments.size() != run.size()) return done(NotFound("merge: the chain has changed"));
  merge_.Start(std::move(segments), merged, std::move(done));
}

// What is being cut keeps the chain that it was given; what the child shares changes with the rest.
void Shard::ReplaceRun(SegmentId first, SegmentId last, SegmentId merged) {
  const std::shared_ptr<const Segment> segment = merge_.Take(merged);
  KV_CHECK(segment != nullptr);
  for (const auto& [id, context] : contexts_) context->ReplaceRun(first, last, segment);
  for (const auto& [child, job] : forks_) Context::ReplaceLinks(&job->chain, first, last, segment);
}

void Shard::CutSome(ContextId child) {
  const auto it = forks_.find(child);
  if (it == forks_.end()) return;  // dropped
  const std::shared_ptr<ForkJob> job = it->second;
  if (job->cut == nullptr || job->cut->done()) return FinishFork(child, OkStatus());
  Misses misses;
  const Status status = job->cut->Step(&misses);
  const auto again = [this, child, job, alive = std::weak_ptr<int>(alive_)](const Status& s) {
    if (alive.expired()) return;
    s.ok() ? CutSome(child) : FinishFork(child, s);
  };
  const auto wait_for_room = [this, job, again](const Status& why) {
    if (reactor_.clock().Now() > job->deadline) return again(why);
    tier_.WaitForRoom([again, why](bool room) { again(room ? OkStatus() : why); });
  };
  if (status.code() == StatusCode::kResourceExhausted) return wait_for_room(status);
  if (!status.ok()) return FinishFork(child, status);
  if (misses.empty()) return reactor_.Post([again] { again(OkStatus()); });
  tier_.Load(misses, [again, wait_for_room, alive = std::weak_ptr<int>(alive_)](const Status& s) {
    if (alive.expired()) return;
    s.code() == StatusCode::kResourceExhausted ? wait_for_room(s) : again(s);
  });
}

void Shard::FinishFork(ContextId child, Status status) {
  auto node = forks_.extract(child);
  if (node.empty()) return;
  const std::shared_ptr<ForkJob> job = std::move(node.mapped());
  if (status.ok()) {
    if (job->cut != nullptr) {
      job->chain.push_back(job->cut->Take());
      tier_.Add(job->chain.back(), false);
    }
    Result<std::unique_ptr<Context>> context =
        Context::Grow(job->spec, std::move(job->chain), pool_, *attention_);
    status = context.status();
    if (status.ok()) {
      const bool inserted = contexts_.emplace(child, std::move(context).value()).second;
      KV_CHECK(inserted);
    }
  }
  job->done(std::move(status));
}

}  // namespace icecache
