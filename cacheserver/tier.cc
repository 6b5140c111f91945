// Loading, and what is common. Storing and evicting: tier_store.cc, tier_evict.cc.
#include "cacheserver/tier.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "cacheserver/store/cold_keys.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {

// One Load call: done when all its parts have ended.
struct Tier::Loading {
  std::vector<std::shared_ptr<const Segment>> segments;  // alive until then
  std::vector<std::pair<PageTable*, PageId>> held;
  size_t parts = 1;  // one for the call itself
  Status status;
  Done done;
  TimePoint started;
};

namespace {

Counter& Evictions(MetricsRegistry& metrics, const char* reason) {
  return metrics.GetCounter("icecache_pages_evicted_total",
                            "Pages of stored segments that gave their memory back: for want of "
                            "memory, of a tenant's quota, or ahead of need.",
                            {{"reason", reason}});
}

}  // namespace

Tier::Tier(Reactor& reactor, PagePool& pool, ColdPool* cold, MetricsRegistry& metrics)
    : reactor_(reactor),
      pool_(pool),
      cold_(cold),
      promoted_(metrics.GetCounter("icecache_pages_promoted_total",
                                   "Pages read back from the cold store into memory.")),
      evicted_{&Evictions(metrics, "memory"), &Evictions(metrics, "quota"),
               &Evictions(metrics, "watermark")},
      stored_(metrics.GetCounter("icecache_pages_stored_total",
                                 "Pages of sealed segments written to the cold store.")),
      failed_(metrics.GetCounter("icecache_cold_reads_failed_total",
                                 "Pages and indexes that could not be read back: missing, corrupt "
                                 "or refused by the store.")),
      promotion_seconds_(
          metrics.GetHistogram("icecache_promotion_seconds",
                               "From a request's miss until what it missed was in memory.")) {
  if (cold_ == nullptr) return;
  pool_.SetReclaimer([this](const PagePool::Shortage& shortage) { Reclaim(shortage); });
  tick_ = reactor_.After(limits::kTierInterval, [this] { Tick(); });
}

Tier::~Tier() {
  if (cold_ == nullptr) return;
  reactor_.Cancel(tick_);
  pool_.SetReclaimer({});
}

size_t Tier::ItemHash::operator()(const Item& item) const {
  uint64_t x = item.segment.value * 0x9e3779b97f4a7c15ull + item.flat;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull + item.page;
  return static_cast<size_t>(x ^ (x >> 32));
}

void Tier::Add(const std::shared_ptr<const Segment>& segment, bool stored) {
  if (cold_ == nullptr) return;
  const auto [it, fresh] = entries_.try_emplace(segment->id(), Entry{segment, stored});
  if (fresh) {
    ring_.push_back(segment->id());
  } else if (it->second.segment.expired()) {
    it->second = {segment, stored};
  }
}

std::shared_ptr<const Segment> Tier::Find(SegmentId segment) const {
  const auto it = entries_.find(segment);
  return it == entries_.end() ? nullptr : it->second.segment.lock();
}

void Tier::Prune() {
  std::erase_if(ring_, [this](SegmentId id) {
    const auto it = entries_.find(id);
    if (!it->second.segment.expired()) return false;
    entries_.erase(it);
    return true;
  });
}

TierUsage Tier::usage() const {
  TierUsage usage;
  for (const auto& [id, entry] : entries_) {
    const std::shared_ptr<const Segment> segment = entry.segment.lock();
    if (segment == nullptr) continue;
    usage.segments_stored += entry.stored;
    for (size_t i = 0; i < segment->slice_count(); ++i) {
      const PageTable& table = segment->stored_slice(i).table();
      usage.pages_cold += table.cold_count();
      usage.pages_warm += table.page_count() - table.cold_count();
    }
  }
  return usage;
}

void Tier::Load(const Misses& misses, Done done) {
  KV_CHECK(cold_ != nullptr);
  auto load = std::make_shared<Loading>();
  load->done = std::move(done);
  load->started = reactor_.clock().Now();
  ++loads_;
  for (const Misses::Slice& slice : misses.slices) {
    load->segments.push_back(slice.segment);
    const ModelShape& shape = slice.segment->spec().shape;
    const uint32_t flat = slice.layer.value * shape.kv_heads + slice.head.value;
    if (slice.index) {
      LoadIndex(load, slice, flat);
    } else {
      LoadPages(load, slice, flat);
    }
  }
  EndPart(load, OkStatus());
}

// True: somebody brings it already.
bool Tier::Join(const Item& item, const std::shared_ptr<Loading>& load) {
  const auto [it, fresh] = in_flight_.try_emplace(item);
  it->second.push_back(load);
  ++load->parts;
  return !fresh;
}

void Tier::LoadIndex(const std::shared_ptr<Loading>& load, const Misses::Slice& missing,
                     uint32_t flat) {
  HeadSlice& slice = missing.segment->stored_slice(missing.layer, missing.head);
  const Item item{missing.segment->id(), flat, kWholeIndex};
  if (slice.index_loaded() || Join(item, load)) return;
  cold_->Submit([this, item, &slice, &cold = *cold_, &reactor = reactor_,
                 alive = std::weak_ptr<int>(alive_)] {
    const auto read = [&]() -> Result<SliceIndex> {
      KV_ASSIGN_OR_RETURN(
          const std::optional<std::string> blob,
          cold.store().Get(ColdColumn::kIndex, cold_keys::Index(item.segment, item.flat)));
      if (!blob) return DataLoss("the stored index of a slice is missing");
      return HeadSlice::ParseIndex(slice.options(), *blob);
    };
    auto index = std::make_shared<Result<SliceIndex>>(read());
    reactor.Post([this, item, index, &slice, alive] {
      if (alive.expired()) return;
      EndItem(item, index->ok() ? slice.AdoptIndex(std::move(*index).value()) : index->status());
    });
  });
}

void Tier::LoadPages(const std::shared_ptr<Loading>& load, const Misses::Slice& missing,
                     uint32_t flat) {
  HeadSlice& slice = missing.segment->stored_slice(missing.layer, missing.head);
  PageTable& table = slice.table();
  std::vector<PageId> batch;
  const auto flush = [&] {
    if (!batch.empty()) ReadPages(slice, missing.segment->id(), flat, std::move(batch));
    batch.clear();
  };
  for (const PageId page : missing.pages) {
    const Item item{missing.segment->id(), flat, page.value};
    table.Hold(page);
    load->held.emplace_back(&table, page);
    if (table.residency(page) == Residency::kWarm) continue;
    if (table.residency(page) == Residency::kCold) {
      if (Status status = table.BeginLoad(page); !status.ok()) {
        load->status = std::move(status);
        break;
      }
      const bool joined = Join(item, load);
      KV_CHECK(!joined);
      batch.push_back(page);
      if (batch.size() == limits::kLoadBatchPages) flush();
    } else {
      const bool joined = Join(item, load);
      KV_CHECK(joined);
    }
  }
  flush();
}

// The slice lives: its pages are in flight, and the load that began them holds the segment.
void Tier::ReadPages(HeadSlice& slice, SegmentId segment, uint32_t flat,
                     std::vector<PageId> pages) {
  cold_->Submit([this, segment, flat, &table = slice.table(), pages = std::move(pages),
                 &cold = *cold_, &reactor = reactor_, alive = std::weak_ptr<int>(alive_)] {
    auto results = std::make_shared<std::vector<std::pair<PageId, Status>>>();
    for (const PageId page : pages) {
      const Result<std::optional<std::string>> stored =
          cold.store().Get(ColdColumn::kPages, cold_keys::Page(segment, flat, page));
      Status status = stored.status();
      if (status.ok()) {
        status = *stored ? table.FillLoading(page, std::as_bytes(std::span(**stored)))
                         : DataLoss("page " + std::to_string(page.value) + " of segment " +
                                    std::to_string(segment.value) +
                                    " is not in the cold store; drop the context");
      }
      results->emplace_back(page, std::move(status));
    }
    reactor.Post([this, segment, flat, &table, results, alive] {
      if (alive.expired()) return;
      for (const auto& [page, status] : *results) {
        table.EndLoad(page, status.ok());
        if (status.ok()) promoted_.Add();
        EndItem({segment, flat, page.value}, status);
      }
    });
  });
}

void Tier::EndItem(const Item& item, const Status& status) {
  auto node = in_flight_.extract(item);
  KV_CHECK(!node.empty());
  if (!status.ok()) failed_.Add();
  for (const std::shared_ptr<Loading>& load : node.mapped()) EndPart(load, status);
}

void Tier::EndPart(const std::shared_ptr<Loading>& load, const Status& status) {
  if (load->status.ok() && !status.ok()) load->status = status;
  if (--load->parts > 0) return;
  if (!load->status.ok() && load->status.code() != StatusCode::kResourceExhausted) {
    LogError("cold store: cannot read back", {{"status", load->status.ToString()}});
  }
  promotion_seconds_.ObserveSeconds(
      std::chrono::duration<double>(reactor_.clock().Now() - load->started).count());
  load->done(load->status);
  for (const auto& [table, page] : load->held) table->Unhold(page);
  --loads_;
}

}  // namespace icecache
