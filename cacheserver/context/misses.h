// Misses: what a request needs that is in the cold store and not in memory. The shard's Tier brings
// it (tier.h), then the request is made again.
#pragma once

#include <memory>
#include <vector>

#include "common/ids.h"

namespace icecache {

class Segment;

struct Misses {
  struct Slice {
    std::shared_ptr<const Segment> segment;
    LayerId layer;
    KvHeadId head;
    bool index = false;         // the whole index: page names and policy
    std::vector<PageId> pages;  // rows of these
  };
  std::vector<Slice> slices;

  bool empty() const { return slices.empty(); }
};

}  // namespace icecache
