// Writing sealed segments to the cold store.
#include <atomic>
#include <utility>

#include "cacheserver/context/manifest.h"
#include "cacheserver/store/cold_keys.h"
#include "cacheserver/tier.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

// Of the pool's memory in use: above it sealed segments are stored in the background.
constexpr double kStoreShare = 0.5;
constexpr Duration kHoldersPause = std::chrono::milliseconds(2);

// Pages, then rows and index, of every slice of the part; on disk when it returns, since whoever
// evicts a page must find it there. Any thread: a sealed segment does not change, and while it is
// not stored its pages stay where they are.
Status WriteSegment(const Segment& segment, ColdStore& store, Counter& pages_stored) {
  const uint64_t losses = store.losses();
  // First what lets the next start find the rest.
  const ColdWrite record{ColdColumn::kRecords, cold_keys::SegmentRecord(segment.id()),
                         EncodeSegmentRecord(segment.id())};
  KV_RETURN_IF_ERROR(store.Put({&record, 1}, false));
  std::vector<ColdWrite> batch;
  for (size_t i = 0; i < segment.slice_count(); ++i) {
    const HeadSlice& slice = segment.stored_slice(i);
    const uint32_t flat = segment.flat_index(i);
    for (uint32_t p = 0; p < slice.page_count(); ++p) {
      ColdWrite& write = batch.emplace_back();
      write.column = ColdColumn::kPages;
      write.key = cold_keys::Page(segment.id(), flat, PageId(p));
      slice.table().AppendStored(PageId(p), &write.value);
      if (batch.size() < limits::kStoreBatchPages) continue;
      KV_RETURN_IF_ERROR(store.Put(batch, false));
      batch.clear();
    }
    pages_stored.Add(slice.page_count());
    batch.push_back({ColdColumn::kIndex, cold_keys::Rows(segment.id(), flat), slice.SaveRows()});
    batch.push_back({ColdColumn::kIndex, cold_keys::Index(segment.id(), flat), slice.SaveIndex()});
    KV_RETURN_IF_ERROR(store.Put(batch, false));
    batch.clear();
  }
  KV_RETURN_IF_ERROR(store.Sync());
  if (store.losses() == losses) return OkStatus();
  return Unavailable("cold store: it was opened again while the segment was written; try again");
}

}  // namespace

void Tier::Store(SegmentId id, Done done) {
  if (cold_ == nullptr) {
    return done(FailedPrecondition("the server keeps nothing on disk; start it with --data-dir"));
  }
  const auto it = entries_.find(id);
  const std::shared_ptr<const Segment> segment =
      it == entries_.end() ? nullptr : it->second.segment.lock();
  if (segment == nullptr) return done(NotFound("segment " + std::to_string(id.value) + " is gone"));
  if (it->second.stored) return done(OkStatus());
  StartWrite(segment, std::move(done));
}

void Tier::StartWrite(const std::shared_ptr<const Segment>& segment, Done done) {
  const SegmentId id = segment->id();
  if (const auto running = writes_.find(id); running != writes_.end()) {
    if (done) running->second->waiting.push_back(std::move(done));
    return;
  }
  if (!cold_->BeginWrite(id)) {
    if (done) done(Cancelled("segment " + std::to_string(id.value) + " is being deleted"));
    return;
  }
  auto write = std::make_unique<Writing>();
  write->segment = segment;
  if (done) write->waiting.push_back(std::move(done));
  writes_.emplace(id, std::move(write));
  cold_->Submit([this, id, lent = segment.get(), &cold = *cold_, &stored = stored_,
                 &reactor = reactor_, alive = std::weak_ptr<int>(alive_)] {
    const Status status = cold.NoteWrite(WriteSegment(*lent, cold.store(), stored));
    cold.EndWrite(id);
    reactor.Post([this, id, status, alive] {
      if (!alive.expired()) FinishWrite(id, status);
    });
  });
}

void Tier::FinishWrite(SegmentId id, const Status& status) {
  auto node = writes_.extract(id);
  KV_CHECK(!node.empty());
  if (const auto it = entries_.find(id); it != entries_.end()) it->second.stored = status.ok();
  for (Done& done : node.mapped()->waiting) done(status);
  auto waiting = std::exchange(waiting_, {});
  for (auto& done : waiting) done(status.ok());
}

// One at a time: the disk is one. False: there is nothing to write, or it cannot be.
bool Tier::StoreOldest() {
  if (!writes_.empty()) return true;
  if (!cold_->WriteHealth().ok()) return false;
  Prune();
  for (const SegmentId id : ring_) {
    const Entry& entry = entries_.at(id);
    if (entry.stored) continue;
    if (const auto segment = entry.segment.lock()) StartWrite(segment, {});
    if (!writes_.empty()) return true;  // else it is being deleted: nobody would hear of its end
  }
  return false;
}

void Tier::WaitForRoom(std::function<void(bool)> done) {
  if (cold_ != nullptr && StoreOldest()) {
    waiting_.push_back(std::move(done));
  } else if (cold_ != nullptr && (loads_ > 0 || pool_.usage().waiting_frames > 0)) {
    // Pages that are held for requests are not evicted, and a reply that is being sent still reads
    // evicted ones.
    (void)reactor_.After(kHoldersPause, [done = std::move(done)] { done(true); });
  } else {
    done(false);
  }
}

void Tier::Tick() {
  const PoolUsage usage = pool_.usage();
  const auto used = static_cast<double>(usage.frame_bytes + usage.row_bytes);
  if (used > kStoreShare * static_cast<double>(usage.memory_bytes)) (void)StoreOldest();
  EvictAboveWatermark(usage);
  tick_ = reactor_.After(limits::kTierInterval, [this] { Tick(); });
}

}  // namespace icecache
