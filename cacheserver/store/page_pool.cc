#include "cacheserver/store/page_pool.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "common/size.h"

#ifndef F_SEAL_FUTURE_WRITE  // Linux 5.1; older headers lack the name
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace icecache {

namespace {

std::string ErrnoText(int error) { return std::strerror(error); }

// A fresh, zeroed extent. Content never passes from one tenant to another, because memory comes
// from the kernel each time.
Status MapExtent(int* fd, std::byte** base) {
  *fd = memfd_create("icecache-extent", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (*fd < 0) {
    const int error = errno;
    if (error == EMFILE || error == ENFILE) {
      return ResourceExhausted("page pool: no file descriptor left for an extent of " +
                               FormatSize(limits::kExtentBytes) + " (" + ErrnoText(error) +
                               "); raise 'ulimit -n' to at least one per extent of --memory-size");
    }
    return Unavailable("page pool: memfd_create: " + ErrnoText(error));
  }
  void* address = MAP_FAILED;
  if (ftruncate(*fd, static_cast<off_t>(limits::kExtentBytes)) == 0) {
    address = mmap(nullptr, limits::kExtentBytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
  }
  if (address == MAP_FAILED) {
    const int error = errno;
    close(*fd);
    return ResourceExhausted("page pool: cannot map an extent of " +
                             FormatSize(limits::kExtentBytes) + " (" + ErrnoText(error) +
                             "); lower --memory-size or free memory on this host");
  }
  // From here on nobody else can map it writable or change its size. Without the newest seal
  // (kernels before 5.1) size stays sealed at least.
  if (fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE) != 0) {
    (void)fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  }
  *base = static_cast<std::byte*>(address);
  return OkStatus();
}

}  // namespace

// Alive while somebody holds a pin of it; the flag outlives it, so that the owner sees the end of
// the last pin with the ordering that reuse of the frames needs.
struct PagePool::Generation {
  std::shared_ptr<std::atomic<bool>> unpinned = std::make_shared<std::atomic<bool>>(false);
  ~Generation() { unpinned->store(true, std::memory_order_release); }
};

PagePool::PagePool(uint64_t memory_bytes) : memory_bytes_(memory_bytes) {
  total_.memory_bytes = memory_bytes;
  StartGeneration();
}

PagePool::~PagePool() {
  Reclaim();
  KV_CHECK(total_.frames == 0 && total_.row_bytes == 0);
  TrimEmptyExtents(nullptr);
  KV_CHECK(total_.extents == 0);
}

void PagePool::StartGeneration() {
  generation_ = std::make_shared<Generation>();
  generation_pinned_ = false;
}

void PagePool::SetQuota(TenantId tenant, uint64_t quota_bytes) {
  accounts_[tenant].usage.quota_bytes = quota_bytes;
}

Status PagePool::CheckRoom(TenantId tenant, const Account& account, uint64_t bytes) const {
  const uint64_t quota = account.usage.quota_bytes;
  const uint64_t held = account.usage.held_bytes();
  if (quota != 0 && (bytes > quota || held > quota - bytes)) {
    return ResourceExhausted("tenant " + std::to_string(tenant.value) + " holds " +
                             FormatSize(held) + " of its quota of " + FormatSize(quota) +
                             " on this shard and asks for " + FormatSize(bytes) +
                             " more; drop contexts or raise the tenant's quota");
  }
  const uint64_t pool_held = total_.held_bytes();
  if (bytes > memory_bytes_ || pool_held > memory_bytes_ - bytes) {
    return ResourceExhausted(
        "page pool of this shard holds " + FormatSize(pool_held) + " of " +
        FormatSize(memory_bytes_) + " (" + std::to_string(total_.extents) + " extents, " +
        FormatSize(total_.row_bytes) + " of rows) and is asked for " + FormatSize(bytes) +
        " more; drop contexts or start the server with a larger --memory-size");
  }
  return OkStatus();
}

// As CheckRoom, after giving back what nobody uses if that is what it takes. keep: a class whose
// empty extents the caller counts on.
Status PagePool::MakeRoom(TenantId tenant, const Account& account, uint64_t bytes,
                          const FrameClass* keep) {
  if (Status status = CheckRoom(tenant, account, bytes); status.ok()) return status;
  TrimEmptyExtents(keep);
  Status status = CheckRoom(tenant, account, bytes);
  if (status.ok() || !reclaim_ || reclaiming_) return status;
  const uint64_t quota = account.usage.quota_bytes;
  const bool of_tenant = quota != 0 && account.usage.held_bytes() + bytes > quota;
  AskReclaimer({.tenant = tenant, .of_tenant = of_tenant, .bytes = bytes});
  TrimEmptyExtents(keep);
  return CheckRoom(tenant, account, bytes);
}

// A refusal by the quota is the tenant's to mend, one by memory the operator's.
Status PagePool::CountRefusal(Account& account, uint64_t bytes, Status status) {
  if (status.code() != StatusCode::kResourceExhausted) return status;
  const uint64_t quota = account.usage.quota_bytes;
  const bool by_quota = quota != 0 && account.usage.held_bytes() + bytes > quota;
  ++(by_quota ? account.usage.refused_by_quota : account.usage.refused_by_memory);
  return status;
}

// What it gives back comes through Release; it asks for nothing.
void PagePool::AskReclaimer(const Shortage& shortage) {
  if (!reclaim_ || reclaiming_) return;
  reclaiming_ = true;
  reclaim_(shortage);
  reclaiming_ = false;
  Reclaim();
}

Status PagePool::AddExtent(TenantId tenant, Account& account, uint32_t frame_bytes) {
  Extent extent;
  KV_RETURN_IF_ERROR(MapExtent(&extent.fd, &extent.base));
  extent.tenant = tenant;
  extent.frame_bytes = frame_bytes;
  extent.serial = next_serial_++;
  extent.frame_count = static_cast<uint32_t>(limits::kExtentBytes / frame_bytes);
  extent.in_use.assign(extent.frame_count, false);
  extent.free_frames.reserve(extent.frame_count);
  for (uint32_t i = extent.frame_count; i > 0; --i) extent.free_frames.push_back(i - 1);

  uint32_t slot = 0;
  if (free_slots_.empty()) {
    slot = static_cast<uint32_t>(extents_.size());
    extents_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  FrameClass& frames = account.classes[frame_bytes];
  frames.partial.insert(slot);
  frames.frames_free += extent.frame_count;
  ++frames.empty_extents;
  ++account.usage.extents;
  ++total_.extents;
  extents_[slot] = std::move(extent);
  return OkStatus();
}

// REQUIRES: the extent is empty. The class stays in the map, so that callers' references hold.
void PagePool::DropExtent(Account& account, uint32_t slot) {
  Extent& extent = extents_[slot];
  KV_CHECK(extent.base != nullptr && extent.free_frames.size() == extent.frame_count);
  FrameClass& frames = account.classes.at(extent.frame_bytes);
  frames.partial.erase(slot);
  frames.frames_free -= extent.frame_count;
  --frames.empty_extents;
  --account.usage.extents;
  --total_.extents;
  for (const auto& [who, told] : extent_dropped_) {
    if (told) told(extent.serial);
  }
  munmap(extent.base, limits::kExtentBytes);
  close(extent.fd);
  extent = Extent{};
  free_slots_.push_back(slot);
}

void PagePool::TrimEmptyExtents(const FrameClass* keep) {
  for (auto& [tenant, account] : accounts_) {
    for (auto& [frame_bytes, frames] : account.classes) {
      if (&frames == keep || frames.empty_extents == 0) continue;
      std::vector<uint32_t> empty;
      for (uint32_t slot : frames.partial) {
        if (extents_[slot].free_frames.size() == extents_[slot].frame_count) empty.push_back(slot);
      }
      for (uint32_t slot : empty) DropExtent(account, slot);
    }
  }
}

Status PagePool::Reserve(TenantId tenant, uint32_t frame_bytes, uint32_t count,
                         std::vector<Frame>* out) {
  KV_CHECK(frame_bytes > 0 && frame_bytes % 64 == 0 && frame_bytes <= limits::kExtentBytes);
  Reclaim();
  Account& account = accounts_[tenant];
  FrameClass& frames = account.classes[frame_bytes];
  const auto extent_bytes = [&] {
    const uint64_t per_extent = limits::kExtentBytes / frame_bytes;
    const uint64_t missing = count - std::min<uint64_t>(count, frames.frames_free);
    return (missing + per_extent - 1) / per_extent * limits::kExtentBytes;
  };
  // Frames of the same kind are the cheapest to take back.
  if (frames.frames_free < count && !CheckRoom(tenant, account, extent_bytes()).ok()) {
    const uint64_t quota = account.usage.quota_bytes;
    AskReclaimer({.tenant = tenant,
                  .of_tenant = quota != 0 && account.usage.held_bytes() + extent_bytes() > quota,
                  .frame_bytes = frame_bytes,
                  .frames = count - static_cast<uint32_t>(frames.frames_free)});
  }
  if (frames.frames_free < count) {
    const uint64_t per_extent = limits::kExtentBytes / frame_bytes;
    const uint64_t extents = (count - frames.frames_free + per_extent - 1) / per_extent;
    const uint64_t bytes = extents * limits::kExtentBytes;
    KV_RETURN_IF_ERROR(
        CountRefusal(account, bytes, MakeRoom(tenant, account, bytes, &frames)));
    for (uint64_t i = 0; i < extents; ++i) {
      if (Status status = AddExtent(tenant, account, frame_bytes); !status.ok()) {
        TrimEmptyExtents(nullptr);
        return status;
      }
    }
  }
  out->reserve(out->size() + count);
  for (uint32_t left = count; left > 0;) {
    const uint32_t slot = *frames.partial.begin();
    Extent& extent = extents_[slot];
    if (extent.free_frames.size() == extent.frame_count) --frames.empty_extents;
    for (; left > 0 && !extent.free_frames.empty(); --left) {
      const uint32_t index = extent.free_frames.back();
      extent.free_frames.pop_back();
      extent.in_use[index] = true;
      const uint32_t offset = index * frame_bytes;
      out->push_back({slot, offset, extent.base + offset});
    }
    if (extent.free_frames.empty()) frames.partial.erase(slot);
  }
  frames.frames_free -= count;
  frames.frames_used += count;
  const uint64_t bytes = uint64_t{count} * frame_bytes;
  account.usage.frames += count;
  account.usage.frame_bytes += bytes;
  total_.frames += count;
  total_.frame_bytes += bytes;
  return OkStatus();
}

void PagePool::Release(TenantId tenant, uint32_t frame_bytes, std::span<const Frame> frames) {
  if (frames.empty()) return;
  if (!generation_pinned_ && waiting_.empty()) return FreeFrames(tenant, frame_bytes, frames);
  // A pin of this generation or of an older one may cover them; the list is served in order, so the
  // youngest generation with pins is the one to wait for.
  Waiting entry;
  entry.unpinned = generation_pinned_ ? generation_->unpinned : waiting_.back().unpinned;
  entry.tenant = tenant;
  entry.frame_bytes = frame_bytes;
  entry.frames.assign(frames.begin(), frames.end());
  waiting_.push_back(std::move(entry));
  total_.waiting_frames += frames.size();
  if (generation_pinned_) StartGeneration();
  Reclaim();
}

void PagePool::Reclaim() {
  while (!waiting_.empty() && waiting_.front().unpinned->load(std::memory_order_acquire)) {
    const Waiting entry = std::move(waiting_.front());
    waiting_.pop_front();
    total_.waiting_frames -= entry.frames.size();
    FreeFrames(entry.tenant, entry.frame_bytes, entry.frames);
  }
}

void PagePool::FreeFrames(TenantId tenant, uint32_t frame_bytes, std::span<const Frame> frames) {
  Account& account = accounts_.at(tenant);
  FrameClass& pool = account.classes.at(frame_bytes);
  const uint64_t bytes = frames.size() * uint64_t{frame_bytes};
  pool.frames_free += frames.size();
  pool.frames_used -= frames.size();
  account.usage.frames -= frames.size();
  account.usage.frame_bytes -= bytes;
  total_.frames -= frames.size();
  total_.frame_bytes -= bytes;
  for (const Frame& frame : frames) {
    Extent& extent = extents_[frame.extent];
    const uint32_t index = frame.offset / frame_bytes;
    KV_CHECK(extent.tenant == tenant && extent.frame_bytes == frame_bytes);
    KV_CHECK(extent.base + frame.offset == frame.data && extent.in_use[index]);
    extent.in_use[index] = false;
    if (extent.free_frames.empty()) pool.partial.insert(frame.extent);
    extent.free_frames.push_back(index);
    if (extent.free_frames.size() < extent.frame_count) continue;
    ++pool.empty_extents;
    // One empty extent stays while the tenant has frames of this size: a slice that takes and
    // returns a frame at an extent's edge would otherwise map and unmap it every time.
    if (pool.empty_extents > 1) DropExtent(account, frame.extent);
  }
  if (pool.frames_used == 0) {
    while (pool.empty_extents > 0) DropExtent(account, *pool.partial.begin());
  }
}

Status PagePool::ReserveBytes(TenantId tenant, uint64_t bytes) {
  Account& account = accounts_[tenant];
  KV_RETURN_IF_ERROR(CountRefusal(account, bytes, MakeRoom(tenant, account, bytes, nullptr)));
  account.usage.row_bytes += bytes;
  total_.row_bytes += bytes;
  return OkStatus();
}

void PagePool::ReleaseBytes(TenantId tenant, uint64_t bytes) {
  if (bytes == 0) return;
  Account& account = accounts_.at(tenant);
  KV_CHECK(account.usage.row_bytes >= bytes);
  account.usage.row_bytes -= bytes;
  total_.row_bytes -= bytes;
}

std::shared_ptr<const void> PagePool::Pin() {
  generation_pinned_ = true;
  return generation_;
}

TenantUsage PagePool::usage(TenantId tenant) {
  Reclaim();
  const auto it = accounts_.find(tenant);
  return it == accounts_.end() ? TenantUsage{} : it->second.usage;
}

PoolUsage PagePool::usage() {
  Reclaim();
  return total_;
}

std::vector<TenantId> PagePool::tenants() const {
  std::vector<TenantId> result;
  for (const auto& [tenant, account] : accounts_) {
    const TenantUsage& usage = account.usage;
    if (usage.held_bytes() + usage.quota_bytes + usage.refused_by_memory > 0)
      result.push_back(tenant);
  }
  return result;
}

std::vector<PagePool::ExtentInfo> PagePool::ExtentsOf(TenantId tenant) const {
  std::vector<ExtentInfo> result;
  for (uint32_t slot = 0; slot < extents_.size(); ++slot) {
    const Extent& extent = extents_[slot];
    if (extent.base != nullptr && extent.tenant == tenant)
      result.push_back({slot, extent.serial, extent.fd, {extent.base, limits::kExtentBytes}});
  }
  return result;
}

Status PagePool::Validate() const {
  PoolUsage sum;
  for (const auto& [tenant, account] : accounts_) {
    uint64_t extents = 0, frames = 0, frame_bytes = 0;
    for (const auto& [size, frame_class] : account.classes) {
      uint64_t used = 0, free = 0;
      uint32_t empty = 0;
      for (uint32_t slot = 0; slot < extents_.size(); ++slot) {
        const Extent& extent = extents_[slot];
        if (extent.base == nullptr || extent.tenant != tenant || extent.frame_bytes != size)
          continue;
        ++extents;
        free += extent.free_frames.size();
        used += extent.frame_count - extent.free_frames.size();
        empty += extent.free_frames.size() == extent.frame_count;
        if (frame_class.partial.contains(slot) == extent.free_frames.empty()) {
          return Internal("page pool: extent " + std::to_string(slot) + " is in the wrong list");
        }
      }
      if (used != frame_class.frames_used || free != frame_class.frames_free ||
          empty != frame_class.empty_extents) {
        return Internal("page pool: frames of " + std::to_string(size) + " bytes of tenant " +
                        std::to_string(tenant.value) + ": extents say " + std::to_string(used) +
                        " used, the ledger " + std::to_string(frame_class.frames_used));
      }
      frames += used;
      frame_bytes += used * size;
    }
    const TenantUsage& usage = account.usage;
    if (extents != usage.extents || frames != usage.frames || frame_bytes != usage.frame_bytes) {
      return Internal("page pool: ledger of tenant " + std::to_string(tenant.value) +
                      " differs from its extents");
    }
    sum.extents += extents;
    sum.frames += frames;
    sum.frame_bytes += frame_bytes;
    sum.row_bytes += usage.row_bytes;
  }
  if (sum.extents != total_.extents || sum.frames != total_.frames ||
      sum.frame_bytes != total_.frame_bytes || sum.row_bytes != total_.row_bytes) {
    return Internal("page pool: the tenants' ledgers do not add up to the pool's");
  }
  if (total_.held_bytes() > memory_bytes_) return Internal("page pool: holds more than its size");
  return OkStatus();
}

}  // namespace icecache
