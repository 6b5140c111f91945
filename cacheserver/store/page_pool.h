// PagePool: the arena of page frames of one shard, and the ledger of who holds how much of it.
//
// Memory is taken in extents (limits::kExtentBytes, each its own memfd, made when needed). An
// extent belongs to one tenant and one frame size, so what a worker may map ends at its tenant; an
// extent that has become empty is unmapped and its memfd closed, never handed to another tenant.
// Plain row buffers (sinks, tails, pending) live on the heap and are charged to the same ledger.
//
// Lifecycle of a frame:
//   1. Reserve      frames of a tenant; the rows in them may be filled by any thread that the owner
//   hands them to
//   2. written once: rows that stand in a frame never change or move; a page whose rows move gets a
//   new frame
//   3. Release      reusable when every pin taken before the release is gone
// So a reply that holds a pin may be sent straight from the frames, and a mapped reader sees whole
// rows.
//
// Thread: the shard's, except pins, which may be dropped on any thread. Outlives everything that
// holds frames. Costs: a tenant holds at least one extent per frame size per shard; quotas below
// that refuse everything.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "common/ids.h"
#include "common/limits.h"
#include "common/status.h"

namespace icecache {

// One page frame. A plain handle: whoever reserved it releases it.
struct Frame {
  uint32_t extent = 0;  // slot of the extent
  uint32_t offset = 0;  // bytes from the extent's start
  std::byte* data = nullptr;
};

// What one tenant holds of this pool. held_bytes is what quotas and the pool's size are compared
// with.
struct TenantUsage {
  uint64_t extents = 0;      // whole extents
  uint64_t frames = 0;       // frames in use, waiting for pins included
  uint64_t frame_bytes = 0;  // in those frames
  uint64_t row_bytes = 0;    // in row buffers
  uint64_t quota_bytes = 0;  // 0: none
  uint64_t refused_by_quota = 0;   // reservations, ever; each try of one that waits counts
  uint64_t refused_by_memory = 0;  // likewise, for want of memory
  uint64_t held_bytes() const { return extents * limits::kExtentBytes + row_bytes; }
};

// The sum over all tenants.
struct PoolUsage {
  uint64_t memory_bytes = 0;  // the pool's size
  uint64_t extents = 0;
  uint64_t frames = 0;
  uint64_t frame_bytes = 0;
  uint64_t row_bytes = 0;
  uint64_t waiting_frames = 0;  // released, but a reply in flight may still read them
  uint64_t held_bytes() const { return extents * limits::kExtentBytes + row_bytes; }
};

class PagePool {
 public:
  // memory_bytes: this shard's share of --memory-size. No memory is touched before it is needed.
  explicit PagePool(uint64_t memory_bytes);
  ~PagePool();  // KV_CHECK: every frame and row byte is back
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // 0 lifts the quota. A quota below what is held refuses what comes, and takes nothing back.
  void SetQuota(TenantId tenant, uint64_t quota_bytes);

  // Appends `count` frames of frame_bytes (a multiple of 64, at most an extent) to *out; all or
  // none. RESOURCE_EXHAUSTED names the limit that was hit, what is in use and the remedy.
  Status Reserve(TenantId tenant, uint32_t frame_bytes, uint32_t count, std::vector<Frame>* out);
  // REQUIRES: each was reserved by this tenant at this size and is released once.
  void Release(TenantId tenant, uint32_t frame_bytes, std::span<const Frame> frames);

  // Asked when there is no room: gives back what can be had again from the cold store. frames > 0:
  // so many frames of `tenant` and `frame_bytes` would do. Otherwise whole extents of
  // kExtentBytes, `bytes` in all, of `tenant` alone when its quota is what is in the way.
  struct Shortage {
    TenantId tenant;
    bool of_tenant = false;
    uint32_t frame_bytes = 0;
    uint32_t frames = 0;
    uint64_t bytes = 0;
  };
  void SetReclaimer(std::function<void(const Shortage&)> reclaim) { reclaim_ = std::move(reclaim); }
  // Frames in use in an extent, and its frame size; 0 when the slot is free.
  uint32_t FramesUsed(uint32_t slot) const {
    return static_cast<uint32_t>(extents_[slot].frame_count - extents_[slot].free_frames.size());
  }
  TenantId ExtentTenant(uint32_t slot) const { return extents_[slot].tenant; }
  uint32_t slot_count() const { return static_cast<uint32_t>(extents_.size()); }

  // Charges bytes that live outside the frames. ReserveBytes: as Reserve.
  Status ReserveBytes(TenantId tenant, uint64_t bytes);
  void ReleaseBytes(TenantId tenant, uint64_t bytes);

  // While the answer lives, no frame that is in use now is handed out again.
  std::shared_ptr<const void> Pin();
  // Takes back released frames whose pins are gone; Reserve, Release and usage do it by themselves.
  void Reclaim();

  TenantUsage usage(TenantId tenant);
  PoolUsage usage();
  // Tenants that hold something, have a quota or were refused, ascending.
  std::vector<TenantId> tenants() const;

  // For workers on the same host: the extents of one tenant. fd: read-only for whoever receives it
  // (sealed against writing); serial: unique for the life of the pool, since slots are reused.
  struct ExtentInfo {
    uint32_t slot = 0;
    uint64_t serial = 0;
    int fd = -1;
    std::span<std::byte> memory{};
  };
  std::vector<ExtentInfo> ExtentsOf(TenantId tenant) const;
  // Told of each extent before its memory goes, by serial; one of each `who`, empty: no more.
  void OnExtentDropped(const void* who, std::function<void(uint64_t)> told) {
    extent_dropped_[who] = std::move(told);
  }
  // REQUIRES: the slot of a frame that is in use.
  uint64_t ExtentSerial(uint32_t slot) const { return extents_[slot].serial; }

  // INTERNAL naming the first sum that does not hold: frames against extents, tenants against the
  // pool.
  Status Validate() const;

 private:
  struct Extent {
    TenantId tenant;
    uint32_t frame_bytes = 0;
    uint64_t serial = 0;
    int fd = -1;
    std::byte* base = nullptr;  // nullptr: the slot is free
    uint32_t frame_count = 0;
    std::vector<uint32_t> free_frames;  // indices; a stack
    std::vector<bool> in_use;           // catches a frame released twice
  };
  // Extents of one tenant and frame size.
  struct FrameClass {
    std::set<uint32_t>
        partial;  // slots with a free frame, empty extents included; lowest first packs memory
    uint64_t frames_used = 0;
    uint64_t frames_free = 0;
    uint32_t empty_extents = 0;
  };
  struct Account {
    TenantUsage usage;
    std::map<uint32_t, FrameClass> classes;  // by frame_bytes
  };
  struct Generation;  // the pins taken between two releases
  struct Waiting {
    std::shared_ptr<const std::atomic<bool>> unpinned;
    TenantId tenant;
    uint32_t frame_bytes = 0;
    std::vector<Frame> frames;
  };

  Status CheckRoom(TenantId tenant, const Account& account, uint64_t bytes) const;
  Status MakeRoom(TenantId tenant, const Account& account, uint64_t bytes, const FrameClass* keep);
  Status CountRefusal(Account& account, uint64_t bytes, Status status);
  Status AddExtent(TenantId tenant, Account& account, uint32_t frame_bytes);
  void DropExtent(Account& account, uint32_t slot);
  void TrimEmptyExtents(const FrameClass* keep);
  void AskReclaimer(const Shortage& shortage);
  void StartGeneration();
  void FreeFrames(TenantId tenant, uint32_t frame_bytes, std::span<const Frame> frames);

  const uint64_t memory_bytes_;
  std::map<TenantId, Account> accounts_;
  std::vector<Extent> extents_;
  std::vector<uint32_t> free_slots_;
  PoolUsage total_;
  uint64_t next_serial_ = 1;
  std::shared_ptr<Generation> generation_;
  bool generation_pinned_ = false;  // a pin was taken since it started
  std::deque<Waiting> waiting_;     // oldest first
  std::function<void(const Shortage&)> reclaim_;
  std::map<const void*, std::function<void(uint64_t)>> extent_dropped_;
  bool reclaiming_ = false;
};

}  // namespace icecache
