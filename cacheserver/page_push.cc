#include "cacheserver/page_push.h"

#include <sys/mman.h>

#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <cstring>
#include <set>
#include <utility>

#include "common/limits.h"
#include "common/log.h"
#include "kernels/gpu/aligned.h"

namespace icecache {

Status CheckPushName(const std::string& name) {
  for (const char* known : {"auto", "off", "emulated"}) {
    if (name == known) return OkStatus();
  }
  return InvalidArgument("'" + name + "', expected auto or off");
}

Result<MakePushDevice> ChoosePushDevice(const std::string& name) {
  if (name == "off") return Unavailable("--push-pages off");
  if (name == "emulated") {
    return MakePushDevice([](const gpu::MemoryHandle&) -> Result<std::unique_ptr<gpu::Device>> {
      return gpu::MakeEmulatedDevice({});
    });
  }
  KV_RETURN_IF_ERROR(gpu::CountCudaDevices().status());
  return MakePushDevice([](const gpu::MemoryHandle& handle) {
    return gpu::MakeCudaDevice({.id = handle.device, .products = false});
  });
}

// An extent mapped once more, writable: every driver registers that. (mmap would not map it so: the
// memfd is sealed against new writers.)
class PagePush::ExtentView {
 public:
  explicit ExtentView(const std::byte* base)
      : base_(::mremap(const_cast<std::byte*>(base), 0, limits::kExtentBytes, MREMAP_MAYMOVE)) {}
  ~ExtentView() {
    if (there()) ::munmap(base_, limits::kExtentBytes);
  }
  ExtentView(const ExtentView&) = delete;
  ExtentView& operator=(const ExtentView&) = delete;
  bool there() const { return base_ != MAP_FAILED; }
  std::span<const std::byte> memory() const {
    return {static_cast<const std::byte*>(base_), limits::kExtentBytes};
  }

 private:
  void* const base_;
};

// The thread of one GPU: its device and all that is registered and open there.
class PagePush::Lane {
 public:
  Lane(const gpu::MemoryHandle& first, MakePushDevice make)
      : kind_(first.kind), id_(first.device), make_(std::move(make)) {}

  bool serves(const gpu::MemoryHandle& handle) const {
    return handle.kind == kind_ && handle.device == id_;
  }
  bool full() const { return queued >= limits::kPushesQueuedMax; }
  template <typename Fn>
  void Run(Fn fn) {
    boost::asio::post(thread_, std::move(fn));
  }
  void Stop() {
    Run([this] { End(); });
    thread_.join();
  }

  uint32_t opens = 0;  // on their way; the owner's
  std::atomic<bool> has_device = false;
  std::atomic<uint32_t> queued = 0;  // pushes

  // On the lane's thread from here on.
  Result<std::span<std::byte>> Open(const std::vector<std::byte>& handle) {
    if (device_ == nullptr) {
      KV_ASSIGN_OR_RETURN(const gpu::MemoryHandle decoded, gpu::DecodeMemoryHandle(handle));
      KV_ASSIGN_OR_RETURN(device_, make_(decoded));
      has_device = true;
      LogInfo("pages are pushed", {{"device", device_->info().name}});
    }
    KV_ASSIGN_OR_RETURN(const std::span<std::byte> memory, device_->Open(handle));
    if (memory.size() > limits::kPushBytes) {
      device_->Close(memory.data());
      return InvalidArgument(std::to_string(memory.size()) + " bytes are offered, at most " +
                             std::to_string(limits::kPushBytes) + " are taken");
    }
    open_.insert(memory.data());
    return memory;
  }
  void Close(std::byte* memory) {
    const auto found = open_.find(memory);
    if (found == open_.end()) return;
    open_.erase(found);
    device_->Close(memory);
  }
  void Forget(uint64_t serial) {
    const auto found = seen_.find(serial);
    if (found == seen_.end()) return;
    if (found->second.seen != nullptr) device_->Unregister(found->second.view->memory().data());
    seen_.erase(found);
  }

  struct Piece {
    uint64_t extent = 0;
    std::shared_ptr<const ExtentView> view;
    std::span<const std::byte> rows;  // in the pool's mapping
    size_t offset = 0;                // in the extent
    uint32_t to = 0;
  };
  Status Push(std::byte* target, const std::vector<Piece>& pieces) {
    size_t staged = 0;
    for (const Piece& piece : pieces) {
      if (Seen(piece) == nullptr) staged += gpu::Aligned(piece.rows.size());
    }
    const size_t list = gpu::Aligned(pieces.size() * sizeof(gpu::CopySpan));
    KV_RETURN_IF_ERROR(
        gpu::DeviceMemory::Grow(*device_, gpu::MemoryKind::kPinned, list + staged, &pinned_));
    auto* span = pinned_.data<gpu::CopySpan>();
    size_t at = list;
    for (const Piece& piece : pieces) {
      const std::byte* from = Seen(piece);
      if (from == nullptr) {
        std::memcpy(pinned_.data(at), piece.rows.data(), piece.rows.size());
        from = pinned_.data(at);
        at += gpu::Aligned(piece.rows.size());
      } else {
        from += piece.offset;
      }
      *span++ = {from, target + piece.to, static_cast<uint32_t>(piece.rows.size())};
    }
    device_->Launch(
        gpu::CopyArgs{pinned_.data<gpu::CopySpan>(), static_cast<uint32_t>(pieces.size())});
    return device_->Synchronize();
  }

 private:
  struct Registered {
    std::shared_ptr<const ExtentView> view;
    const std::byte* seen = nullptr;  // by the device; null: refused
  };

  const std::byte* Seen(const Piece& piece) {
    if (!piece.view->there()) return nullptr;
    const auto known = seen_.find(piece.extent);
    if (known != seen_.end()) return known->second.seen;
    const auto seen = device_->Register(piece.view->memory(), gpu::Mapping::kWritable);
    if (!seen.ok() && !refused_) {
      refused_ = true;
      LogWarn("an extent is not registered; pages are copied before they are pushed",
              {{"reason", seen.status().ToString()}});
    }
    const Registered registered{piece.view, seen.ok() ? *seen : nullptr};
    return seen_.emplace(piece.extent, registered).first->second.seen;
  }

  void End() {
    if (device_ == nullptr) return;
    while (!seen_.empty()) Forget(seen_.begin()->first);
    while (!open_.empty()) Close(*open_.begin());
    pinned_ = {};
    device_.reset();
  }

  const gpu::MemoryHandle::Kind kind_;
  const gpu::DeviceId id_;
  const MakePushDevice make_;
  std::unique_ptr<gpu::Device> device_;
  std::multiset<std::byte*> open_;  // a runtime may map what is opened twice in one place
  std::map<uint64_t, Registered> seen_;
  gpu::DeviceMemory pinned_;  // spans, then staged rows
  bool refused_ = false;
  boost::asio::thread_pool thread_{1};
};

class PushTarget {
 public:
  PushTarget(std::shared_ptr<PagePush::Lane> lane, std::span<std::byte> memory,
             std::shared_ptr<int> counted, Gauge& targets)
      : lane_(std::move(lane)), memory_(memory), counted_(std::move(counted)), targets_(targets) {
    targets_.Add(1);
  }
  ~PushTarget() {
    targets_.Add(-1);
    lane_->Run([lane = lane_.get(), memory = memory_.data()] { lane->Close(memory); });
  }
  PushTarget(const PushTarget&) = delete;
  PushTarget& operator=(const PushTarget&) = delete;

  PagePush::Lane& lane() const { return *lane_; }
  std::span<std::byte> memory() const { return memory_; }

 private:
  const std::shared_ptr<PagePush::Lane> lane_;  // stopped by PagePush, whoever outlives it
  const std::span<std::byte> memory_;
  const std::shared_ptr<int> counted_;
  Gauge& targets_;
};

PagePush::PagePush(PagePool& pool, Reactor& reactor, MetricsRegistry& metrics, MakePushDevice make)
    : pool_(pool),
      reactor_(reactor),
      make_(std::move(make)),
      bytes_(metrics.GetCounter("icecache_pushed_bytes_total",
                                "Rows of pages written into memory of workers' GPUs.")),
      seconds_(metrics.GetHistogram(
          "icecache_push_seconds",
          "From a selection's choice until its pages are in the worker's memory.")),
      targets_(metrics.GetGauge("icecache_push_targets",
                                "Memories that workers have offered for pages, now open.")) {
  pool_.OnExtentDropped(this, [this](uint64_t serial) {
    if (views_.erase(serial) == 0) return;
    for (const auto& lane : lanes_) lane->Run([l = lane.get(), serial] { l->Forget(serial); });
  });
}

PagePush::~PagePush() {
  pool_.OnExtentDropped(this, {});
  alive_.reset();
  for (const auto& lane : lanes_) lane->Stop();
}

Result<std::shared_ptr<PagePush::Lane>> PagePush::LaneOf(const gpu::MemoryHandle& handle) {
  for (const auto& lane : lanes_) {
    if (lane->serves(handle)) return lane;
  }
  if (lanes_.size() >= limits::kPushDevicesMax) {
    return ResourceExhausted("pages are pushed to " + std::to_string(lanes_.size()) +
                             " GPUs already, the maximum");
  }
  lanes_.push_back(std::make_shared<Lane>(handle, make_));
  return lanes_.back();
}

void PagePush::Open(std::span<const std::byte> bytes, Opened done) {
  const auto answer = [&](Status status) {
    reactor_.Post(
        [done = std::move(done), status = std::move(status), alive = std::weak_ptr<int>(alive_)] {
          if (!alive.expired()) done(status);
        });
  };
  const Result<gpu::MemoryHandle> handle = gpu::DecodeMemoryHandle(bytes);
  if (!handle.ok()) return answer(handle.status());
  if (counted_.use_count() > static_cast<long>(limits::kPushTargetsMax)) {
    return answer(ResourceExhausted(std::to_string(limits::kPushTargetsMax) +
                                    " workers have offered memory to this shard, the maximum"));
  }
  const Result<std::shared_ptr<Lane>> found = LaneOf(*handle);
  if (!found.ok()) return answer(found.status());
  ++(*found)->opens;
  (*found)->Run([this, lane = *found, copy = std::vector(bytes.begin(), bytes.end()),
                 counted = counted_, alive = std::weak_ptr<int>(alive_),
                 done = std::move(done)]() mutable {
    const Result<std::span<std::byte>> memory = lane->Open(copy);
    std::shared_ptr<PushTarget> target;
    if (memory.ok()) {
      target = std::make_shared<PushTarget>(lane, *memory, std::move(counted), targets_);
    }
    reactor_.Post([this, lane = std::move(lane), done = std::move(done), target = std::move(target),
                   alive = std::move(alive), status = memory.status()]() mutable {
      if (alive.expired()) return;
      --lane->opens;
      DropIdle(*lane);
      if (status.ok()) return done(std::move(target));
      done(status);
    });
  });
}

// A handle may name any GPU: one that is not there keeps no thread.
void PagePush::DropIdle(Lane& lane) {
  if (lane.opens > 0 || lane.has_device) return;
  lane.Stop();
  std::erase_if(lanes_, [&lane](const auto& other) { return other.get() == &lane; });
}

uint64_t PagePush::Room(const PushTarget& target) {
  return target.lane().full() ? 0 : target.memory().size();
}

std::shared_ptr<const PagePush::ExtentView> PagePush::ViewOf(const PushSpan& span) {
  auto& view = views_[span.extent];
  if (view == nullptr) view = std::make_shared<ExtentView>(span.base);
  return view;
}

void PagePush::Push(const std::shared_ptr<PushTarget>& target, const std::vector<PushSpan>& spans,
                    std::shared_ptr<const void> pin, std::function<void(Status)> done) {
  std::vector<Lane::Piece> pieces;
  pieces.reserve(spans.size());
  uint64_t bytes = 0;
  for (const PushSpan& span : spans) {
    KV_CHECK(span.to + span.rows.size() <= target->memory().size());
    pieces.push_back({span.extent, ViewOf(span), span.rows,
                      static_cast<size_t>(span.rows.data() - span.base), span.to});
    bytes += span.rows.size();
  }
  ++target->lane().queued;
  const TimePoint begin = reactor_.clock().Now();
  const uint64_t id = next_push_++;
  pushing_.emplace(id, std::move(done));
  target->lane().Run([this, target, pieces = std::move(pieces), pin = std::move(pin), bytes, begin,
                      id, alive = std::weak_ptr<int>(alive_)]() mutable {
    const Status status = target->lane().Push(target->memory().data(), pieces);
    --target->lane().queued;
    pieces.clear();
    pin.reset();
    bytes_.Add(status.ok() ? bytes : 0);
    seconds_.ObserveSeconds(std::chrono::duration<double>(reactor_.clock().Now() - begin).count());
    reactor_.Post([this, id, status, alive = std::move(alive)] {
      if (alive.expired()) return;
      const auto push = pushing_.extract(id);
      push.mapped()(status);
    });
  });
}

}  // namespace icecache
