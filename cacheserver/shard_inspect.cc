// What icecachectl asks a shard: where a context's pages are, what its last selections covered, and
// whether every page is still what was written.
#include <set>
#include <utility>

#include "cacheserver/shard.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {

ContextDetail Shard::Detail(ContextId id) const {
  ContextDetail detail;
  const auto it = contexts_.find(id);
  if (it == contexts_.end()) return detail;
  detail.found = true;
  it->second->VisitSegments([&](const Segment& segment) {
    SegmentDetail& part = detail.segments[segment.id()];
    part.stored = tier_.Stored(segment.id());
    segment.VisitSlices([&](LayerId, KvHeadId, const HeadSlice& slice) {
      ++part.slices;
      for (uint32_t page = 0; page < slice.page_count(); ++page)
        ++(slice.residency(PageId(page)) == Residency::kWarm ? part.warm_pages : part.cold_pages);
      part.indexed_tokens += slice.indexed_count();
      part.pending_tokens += slice.pending_count();
    });
    part.kv_bytes = segment.kv_bytes();
    part.index_bytes = segment.index_bytes();
  });
  if (const auto last = selections_.find(id); last != selections_.end())
    detail.selections.assign(last->second.begin(), last->second.end());
  return detail;
}

void Shard::Remember(ContextId context, const SelectionRecord& selection) {
  std::deque<SelectionRecord>& last = selections_[context];
  if (last.size() >= limits::kSelectionsRememberedMax) last.pop_front();
  last.push_back(selection);
}

struct Shard::VerifyJob {
  struct Slice {
    ContextId context;
    SegmentId segment;
    LayerId layer;
    KvHeadId head;
  };
  std::deque<Slice> left;
  VerifyResult result;
  std::function<void(VerifyResult)> done;
};

void Shard::Verify(const std::vector<ContextId>& ids, std::function<void(VerifyResult)> done) {
  const auto job = std::make_shared<VerifyJob>();
  job->done = std::move(done);
  std::set<SegmentId> seen;
  for (const ContextId id : ids) {
    const Context* context = FindContext(id);
    if (context == nullptr) continue;
    context->VisitSegments([&](const Segment& segment) {
      if (!seen.insert(segment.id()).second) return;
      segment.VisitSlices([&](LayerId layer, KvHeadId head, const HeadSlice&) {
        job->left.push_back({id, segment.id(), layer, head});
      });
    });
  }
  VerifySome(job);
}

void Shard::VerifySome(const std::shared_ptr<VerifyJob>& job) {
  if (job->left.empty()) return job->done(std::move(job->result));
  const VerifyJob::Slice next = job->left.front();
  job->left.pop_front();
  if (const Context* context = FindContext(next.context); context != nullptr) {
    context->VisitSegments([&](const Segment& segment) {
      if (segment.id() != next.segment) return;
      const HeadSlice* slice = segment.slice(next.layer, next.head);
      if (slice == nullptr) return;
      ++job->result.slices;
      job->result.pages += slice->page_count();
      const Status status = slice->VerifyPages();
      if (status.ok()) return;
      checksum_failures_.Add();
      const Status where = status.WithContext("context " + std::to_string(next.context.value) +
                                              ", segment " + std::to_string(next.segment.value) +
                                              ", layer " + std::to_string(next.layer.value) +
                                              ", kv head " + std::to_string(next.head.value));
      LogError("verify: damage", {{"status", where.ToString()}});
      ++job->result.damaged_slices;
      if (job->result.damage.size() < limits::kDamageReportedMax)
        job->result.damage.push_back(where.message());
    });
  }
  reactor_.Post([this, job, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) VerifySome(job);
  });
}

}  // namespace icecache
