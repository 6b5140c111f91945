// Taking frames back: the clock, and whole extents where it must be an extent.
#include <algorithm>
#include <utility>

#include "cacheserver/tier.h"
#include "common/limits.h"

namespace icecache {
namespace {

// Of the pool's memory: above the first, pages are evicted in the background down to the second, so
// that a request seldom has to.
constexpr double kEvictAbove = 0.92, kEvictTo = 0.88;

}  // namespace

// Every page table of a stored segment, index in memory.
template <typename Visit>
void Tier::VisitStoredTables(const Visit& visit) {
  for (const SegmentId id : ring_) {
    const Entry& entry = entries_.at(id);
    const std::shared_ptr<const Segment> segment = entry.stored ? entry.segment.lock() : nullptr;
    for (size_t i = 0; segment != nullptr && i < segment->slice_count(); ++i) {
      visit(segment->stored_slice(i).table());
    }
  }
}

void Tier::Evict(PageTable& table, PageId page, Reason reason) {
  table.Evict(page);
  evicted_[static_cast<size_t>(reason)]->Add();
}

// The hand goes on until `frames` pages gave their frame back, but not more than twice round: the
// first round takes the bits of what was used, the second takes pages. Returns how many.
uint32_t Tier::Sweep(const std::function<bool(const PageTable&)>& eligible, uint32_t frames,
                     Reason reason) {
  Prune();
  uint32_t evicted = 0;
  for (size_t step = 0; step < 2 * ring_.size() + 1 && evicted < frames && !ring_.empty(); ++step) {
    hand_segment_ %= ring_.size();
    const Entry& entry = entries_.at(ring_[hand_segment_]);
    const std::shared_ptr<const Segment> segment = entry.stored ? entry.segment.lock() : nullptr;
    for (; segment != nullptr && hand_slice_ < segment->slice_count(); ++hand_slice_) {
      PageTable& table = segment->stored_slice(hand_slice_).table();
      for (; eligible(table) && hand_page_ < table.page_count(); ++hand_page_) {
        if (evicted == frames) return evicted;
        const PageId page(hand_page_);
        if (table.residency(page) != Residency::kWarm || table.held(page)) continue;
        if (table.TakeReferenced(page)) continue;
        Evict(table, page, reason);
        ++evicted;
      }
      hand_page_ = 0;
    }
    hand_slice_ = 0;
    ++hand_segment_;
  }
  return evicted;
}

void Tier::Reclaim(const PagePool::Shortage& shortage) {
  if (shortage.frames > 0) {
    Sweep(
        [&](const PageTable& table) {
          return table.tenant() == shortage.tenant && table.frame_bytes() == shortage.frame_bytes;
        },
        shortage.frames, shortage.of_tenant ? Reason::kQuota : Reason::kMemory);
  } else {
    EvictExtents(shortage);
  }
}

// Extents in which every frame in use could go; those with the fewest used pages first.
void Tier::EvictExtents(const PagePool::Shortage& shortage) {
  Prune();
  struct Extent {
    uint32_t slot = 0, evictable = 0, referenced = 0;
    bool chosen = false;
  };
  std::vector<Extent> extents(pool_.slot_count());
  const auto evictable = [](const PageTable& table, PageId page) {
    return table.residency(page) == Residency::kWarm && !table.held(page);
  };
  VisitStoredTables([&](PageTable& table) {
    if (shortage.of_tenant && table.tenant() != shortage.tenant) return;
    for (uint32_t p = 0; p < table.page_count(); ++p) {
      if (!evictable(table, PageId(p))) continue;
      Extent& extent = extents[table.frame(PageId(p)).extent];
      ++extent.evictable;
      extent.referenced += table.referenced(PageId(p));
    }
  });
  std::vector<Extent*> order;
  for (uint32_t slot = 0; slot < extents.size(); ++slot) {
    extents[slot].slot = slot;
    if (extents[slot].evictable > 0 && extents[slot].evictable == pool_.FramesUsed(slot)) {
      order.push_back(&extents[slot]);
    }
  }
  std::sort(order.begin(), order.end(), [](const Extent* a, const Extent* b) {
    return a->referenced != b->referenced ? a->referenced < b->referenced : a->slot < b->slot;
  });
  // One more than is missing: the class that asks may keep an empty one.
  const uint64_t wanted = (shortage.bytes + limits::kExtentBytes - 1) / limits::kExtentBytes + 1;
  for (size_t i = 0; i < order.size() && i < wanted; ++i) order[i]->chosen = true;
  const Reason reason = shortage.of_tenant ? Reason::kQuota : Reason::kMemory;
  VisitStoredTables([&](PageTable& table) {
    for (uint32_t p = 0; p < table.page_count(); ++p) {
      if (!evictable(table, PageId(p)) || !extents[table.frame(PageId(p)).extent].chosen) continue;
      Evict(table, PageId(p), reason);
    }
  });
}

void Tier::EvictAboveWatermark(const PoolUsage& usage) {
  const auto size = static_cast<double>(usage.memory_bytes);
  const auto used = static_cast<double>(usage.frame_bytes + usage.row_bytes);
  if (used <= kEvictAbove * size || usage.frames == 0) return;
  const double frame = static_cast<double>(usage.frame_bytes) / static_cast<double>(usage.frames);
  Sweep([](const PageTable&) { return true; },
        static_cast<uint32_t>((used - kEvictTo * size) / frame) + 1, Reason::kWatermark);
}

}  // namespace icecache
