#include "worker/extent_map.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "common/limits.h"
#include "common/log.h"
#include "kernels/gpu/page_intake.h"

namespace icecache {

void PointRowsAtFrame(const ModelShape& shape, std::span<const std::byte> frame,
                      wire::PagePayload* page) {
  const size_t row_bytes = shape.row_bytes();
  const size_t rows = size_t{page->fill} - page->from;
  page->k_rows = frame.subspan(page->from * row_bytes, rows * row_bytes);
  page->v_rows = frame.subspan((limits::kPageTokens + page->from) * row_bytes, rows * row_bytes);
  page->positions = frame.subspan(
      limits::kPageTokens * 2 * row_bytes + page->from * sizeof(uint32_t), rows * sizeof(uint32_t));
}

Result<std::unique_ptr<ExtentMap>> ExtentMap::Open(const Clock& clock, const std::string& name,
                                                   std::span<const std::byte> ticket,
                                                   gpu::PageIntake* intake) {
  KV_ASSIGN_OR_RETURN(OwnedFd socket, ConnectExtents(name));
  std::unique_ptr<ExtentMap> map(new ExtentMap(clock, std::move(socket), intake));
  KV_RETURN_IF_ERROR(map->Fetch(ticket, {}));
  map->last_drop_ = clock.Now();
  return map;
}

ExtentMap::~ExtentMap() {
  for (const auto& [serial, extent] : extents_) Unmap(extent.base);
}

void ExtentMap::Unmap(const std::byte* base) {
  if (intake_ != nullptr) intake_->Forget(base);  // after what still reads it
  ::munmap(const_cast<std::byte*>(base), limits::kExtentBytes);
}

Status ExtentMap::Fetch(std::span<const std::byte> ticket, std::vector<uint64_t> serials) {
  ExtentRequest request;
  request.ticket.assign(ticket.begin(), ticket.end());
  request.serials = std::move(serials);
  KV_RETURN_IF_ERROR(SendExtentRequest(socket_.get(), request));
  KV_ASSIGN_OR_RETURN(const std::vector<LentExtent> lent,
                      ReceiveExtents(socket_.get(), limits::kExtentWaitMax));
  for (const LentExtent& extent : lent) {
    if (extents_.contains(extent.serial)) continue;
    // Populated at once: else each page that is chosen for the first time costs faults in the middle
    // of a decode step, which took most of a step's transfer.
    void* base = ::mmap(nullptr, limits::kExtentBytes, PROT_READ, MAP_SHARED | MAP_POPULATE,
                        extent.fd.get(), 0);
    if (base == MAP_FAILED) {
      return ResourceExhausted(std::string("an extent of the server cannot be mapped: ") +
                               std::strerror(errno));
    }
    extents_[extent.serial] = {static_cast<const std::byte*>(base), clock_.Now()};
    if (intake_ == nullptr || !registration_.ok()) continue;
    registration_ = intake_->Register({static_cast<const std::byte*>(base), limits::kExtentBytes});
    if (registration_.ok() || !intake_->device().registers) continue;
    LogWarn("the device does not register the server's memory; pages there are landed",
            {{"reason", registration_.ToString()}});
  }
  return OkStatus();
}

std::span<const std::byte> ExtentMap::Find(uint64_t serial, uint32_t offset, size_t bytes,
                                           std::span<const std::byte> ticket) {
  if (offset > limits::kExtentBytes || bytes > limits::kExtentBytes - offset) return {};
  auto it = extents_.find(serial);
  if (it == extents_.end() && status_.ok()) {
    status_ = Fetch(ticket, {serial});
    it = extents_.find(serial);
  }
  if (it == extents_.end()) return {};
  it->second.used = clock_.Now();
  return {it->second.base + offset, bytes};
}

void ExtentMap::DropIdle() {
  const TimePoint now = clock_.Now();
  if (now - last_drop_ < limits::kExtentIdleMax / 8) return;
  last_drop_ = now;
  for (auto it = extents_.begin(); it != extents_.end();) {
    if (now - it->second.used < limits::kExtentIdleMax) {
      ++it;
      continue;
    }
    Unmap(it->second.base);
    it = extents_.erase(it);
  }
}

}  // namespace icecache
