// SegmentMerge: a new sealed segment that holds the tokens of a run of a chain's segments,
// clustered as one (docs/adr/0019-merging-segments.md). One slice a step, so that a shard serves
// others between.
//
//   (Prepare -> job->Run on any thread -> Install)* until done() -> Take
// Holds the run: its contexts may be dropped meanwhile. Memory: a copy of the run's tokens and, for
// one slice at a time, its rows a second time; on the account of the run's owner. Cost of Prepare:
// a few words for each page. Thread: the shard's.
#pragma once

#include <memory>
#include <vector>

#include "cacheserver/context/misses.h"
#include "cacheserver/context/segment.h"

namespace icecache {

class SegmentMerge {
 public:
  // run: sealed, oldest first, each starting at the tail of the one before, of one tenant, shape,
  // policy and seed; not empty. merged: never used before.
  SegmentMerge(PagePool& pool, std::vector<std::shared_ptr<const Segment>> run, SegmentId merged);
  SegmentMerge(const SegmentMerge&) = delete;
  SegmentMerge& operator=(const SegmentMerge&) = delete;

  // The clustering of the next slice; nullptr when it names what must come into memory first.
  // Errors as HeadSlice::PrepareMerge; may be tried again. REQUIRES: not done, no job outstanding.
  Result<std::unique_ptr<SliceJob>> Prepare(Misses* misses);
  // Of the job that Prepare gave and that has run. RESOURCE_EXHAUSTED: the merge is at an end.
  Status Install(std::unique_ptr<SliceJob> job);
  bool done() const { return next_ == segment_->slice_count(); }
  std::shared_ptr<const Segment> Take();  // REQUIRES: done

  const SegmentSpec& spec() const { return segment_->spec(); }
  // Page frames and rows that the new segment takes, about.
  uint64_t kv_bytes() const;

 private:
  const std::vector<std::shared_ptr<const Segment>> run_;
  std::shared_ptr<Segment> segment_;
  size_t next_ = 0;  // slice
};

}  // namespace icecache
