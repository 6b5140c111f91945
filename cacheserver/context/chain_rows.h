// Rows of a chain by position, wherever they are: sinks, pages, pending, tail. For what needs tokens
// as they were written, not as they are clustered: a prefill that goes on from a prefix, a cut.
//
// Cost: every page of the slices that overlap the range is looked at (16 positions each); rows are
// copied once. Thread: the shard's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "cacheserver/context/misses.h"
#include "cacheserver/context/segment.h"

namespace icecache {

// A range of positions and where its rows go: k and v [count, head_dim] in the stored dtype.
struct RowRange {
  uint32_t first = 0;
  uint32_t count = 0;
  std::byte* k = nullptr;
  std::byte* v = nullptr;
};

// chain: sealed, oldest first; tail: what grows behind them, or nullptr. What is not in memory is
// added to *misses, and then nothing is copied: bring it and ask again. OUT_OF_RANGE when the chain
// does not hold the whole range. REQUIRES: the shard owns the slice.
Status ReadChainRows(std::span<const std::shared_ptr<const Segment>> chain, const Segment* tail,
                     LayerId layer, KvHeadId head, const RowRange& range, Misses* misses);

}  // namespace icecache
