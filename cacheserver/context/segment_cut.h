// SegmentCut: a new sealed segment that holds the first tokens of a segment of a chain, for a fork at
// an earlier token (docs/adr/0013-fork-at-a-token.md). One slice a step, so that a shard serves others between.
//
//   Step* until done() -> Take
// Holds the chain: its contexts may be dropped meanwhile. Memory: a copy of the tokens kept, on the
// account of spec.tenant. Cost of a step: one copy of the slice's rows. Thread: the shard's.
#pragma once

#include <memory>
#include <vector>

#include "cacheserver/context/chain_rows.h"
#include "cacheserver/context/segment.h"

namespace icecache {

class SegmentCut {
 public:
  // Of chain[link]; spec is that of the new segment: shape, policy, seed and first position are the
  // old one's. The new one ends at `ends`; its tail [tail_first, end) may lie in later segments.
  SegmentCut(PagePool& pool, std::vector<std::shared_ptr<const Segment>> chain, size_t link,
             const SegmentSpec& spec, SegmentEnds ends);
  SegmentCut(const SegmentCut&) = delete;
  SegmentCut& operator=(const SegmentCut&) = delete;

  // Cuts the next slice, or names what must come into memory first and changes nothing.
  // RESOURCE_EXHAUSTED: may be tried again.
  Status Step(Misses* misses);
  bool done() const { return next_ == segment_->slice_count(); }
  std::shared_ptr<const Segment> Take();  // REQUIRES: done

 private:
  const std::vector<std::shared_ptr<const Segment>> chain_;
  const size_t link_;
  const SegmentEnds ends_;
  std::shared_ptr<Segment> segment_;
  size_t next_ = 0;
};

}  // namespace icecache
