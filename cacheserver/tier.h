// Tier: moves what sealed segments of one shard hold between memory and the cold store.
//
//   Store   a sealed segment's pages, rows and indexes are written, once. Then its pages may be evicted.
//   Load    indexes and pages that a request missed come back, checked; they are held until it is done.
//   evict   a clock goes over the pages of stored segments: one that was used since the last round
//           stays, others give their frame back. Runs when the page pool has no room, and in the
//           background above a watermark. Costs no disk write.
//
// Above kStoreShare of the pool in use, sealed segments are stored in the background, the oldest
// first, so that there is something to evict by the time the pool is full. Summaries, sinks and
// tails stay in memory. Without a cold store nothing moves.
//
// A page that fails its check is DATA_LOSS for the request; the others go on. Thread: the shard's.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cacheserver/context/misses.h"
#include "cacheserver/context/segment.h"
#include "cacheserver/store/cold_pool.h"
#include "cacheserver/store/page_pool.h"
#include "common/metrics.h"
#include "common/reactor.h"

namespace icecache {

struct TierUsage {
  uint64_t pages_warm = 0;  // of sealed segments whose index is in memory
  uint64_t pages_cold = 0;
  uint64_t segments_stored = 0;
};

class Tier {
 public:
  // Borrows all; `cold` may be nullptr. Becomes the pool's reclaimer.
  Tier(Reactor& reactor, PagePool& pool, ColdPool* cold, MetricsRegistry& metrics);
  ~Tier();  // after ColdPool::Stop
  Tier(const Tier&) = delete;
  Tier& operator=(const Tier&) = delete;

  // A sealed segment of a context of this shard. stored: it was read from the cold store.
  void Add(const std::shared_ptr<const Segment>& segment, bool stored);
  // nullptr: none that is alive.
  std::shared_ptr<const Segment> Find(SegmentId segment) const;

  // Whether there is a cold store, so that memory can be had again from what is used least.
  bool evicts() const { return cold_ != nullptr; }
  // Whether this shard's part of it is on disk.
  bool Stored(SegmentId segment) const {
    const auto it = entries_.find(segment);
    return it != entries_.end() && it->second.stored;
  }

  using Done = std::function<void(Status)>;
  // `done` on a later turn, or at once when all is here; the pages cannot be evicted before it has
  // returned. RESOURCE_EXHAUSTED: no frames now; DATA_LOSS; UNAVAILABLE: the store.
  void Load(const Misses& misses, Done done);
  // Writes this shard's part. OK when it is on disk.
  void Store(SegmentId segment, Done done);
  // For a request that found no room: true when something may have become evictable since, on a
  // later turn; false when waiting is of no use: there is nothing to store, no reply is being sent
  // and no load holds pages.
  void WaitForRoom(std::function<void(bool)> done);

  TierUsage usage() const;

 private:
  struct Entry {
    std::weak_ptr<const Segment> segment;
    bool stored = false;
  };
  struct Loading;
  struct Writing {
    std::shared_ptr<const Segment> segment;
    std::vector<Done> waiting;
  };
  struct Item {  // an index (page = kWholeIndex) or a page of a slice
    SegmentId segment;
    uint32_t flat = 0;
    uint32_t page = 0;
    friend bool operator==(const Item&, const Item&) = default;
  };
  struct ItemHash {
    size_t operator()(const Item& item) const;
  };
  static constexpr uint32_t kWholeIndex = ~0u;

  bool Join(const Item& item, const std::shared_ptr<Loading>& load);
  void LoadIndex(const std::shared_ptr<Loading>& load, const Misses::Slice& slice, uint32_t flat);
  void LoadPages(const std::shared_ptr<Loading>& load, const Misses::Slice& slice, uint32_t flat);
  void ReadPages(HeadSlice& slice, SegmentId segment, uint32_t flat, std::vector<PageId> pages);
  void EndItem(const Item& item, const Status& status);
  void EndPart(const std::shared_ptr<Loading>& load, const Status& status);

  void StartWrite(const std::shared_ptr<const Segment>& segment, Done done);
  void FinishWrite(SegmentId segment, const Status& status);
  bool StoreOldest();
  void Tick();

  enum class Reason : uint8_t { kMemory, kQuota, kWatermark };
  void Evict(PageTable& table, PageId page, Reason reason);
  void Reclaim(const PagePool::Shortage& shortage);
  uint32_t Sweep(const std::function<bool(const PageTable&)>& eligible, uint32_t frames,
                 Reason reason);
  void EvictExtents(const PagePool::Shortage& shortage);
  void EvictAboveWatermark(const PoolUsage& usage);
  template <typename Visit>
  void VisitStoredTables(const Visit& visit);
  void Prune();

  Reactor& reactor_;
  PagePool& pool_;
  ColdPool* const cold_;
  Counter& promoted_;
  const std::array<Counter*, 3> evicted_;  // by Reason
  Counter& stored_;
  Counter& failed_;
  Histogram& promotion_seconds_;

  std::unordered_map<SegmentId, Entry> entries_;
  std::vector<SegmentId> ring_;  // in the order of Add
  size_t hand_segment_ = 0, hand_slice_ = 0;
  uint32_t hand_page_ = 0;
  std::unordered_map<Item, std::vector<std::shared_ptr<Loading>>, ItemHash> in_flight_;
  uint32_t loads_ = 0;  // that hold pages
  std::unordered_map<SegmentId, std::unique_ptr<Writing>> writes_;
  std::vector<std::function<void(bool)>> waiting_;  // for room
  Reactor::TimerId tick_ = 0;
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
