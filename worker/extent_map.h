// ExtentMap: the extents of this worker's tenant in one shard's memory, mapped read-only (reply
// mode "mapped"). Extents that were made later are fetched when a page first names them; one that
// no page has named for kExtentIdleMax is let go, since the server's memory is not free before
// that.
//
// A frame may be reused by the server at any time: whoever reads one copies it and verifies the
// copy. With an intake, extents are registered there while they are mapped, so that a device can
// read them by itself. Owner's thread: the decode thread, which a fetch holds for at most
// kExtentWaitMax.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/extent_socket.h"
#include "common/model_shape.h"
#include "common/status.h"
#include "common/wire/data_codec.h"

namespace icecache {

namespace gpu {
class PageIntake;
}

// The rows of a page that are missing, in its frame.
void PointRowsAtFrame(const ModelShape& shape, std::span<const std::byte> frame,
                      wire::PagePayload* page);

class ExtentMap {
 public:
  // Connects and maps what there is already. UNAVAILABLE: the server is not on this host (or in
  // another network namespace); UNAUTHENTICATED: the ticket's lease has ended.
  static Result<std::unique_ptr<ExtentMap>> Open(const Clock& clock, const std::string& name,
                                                 std::span<const std::byte> ticket,
                                                 gpu::PageIntake* intake = nullptr);
  ~ExtentMap();  // unmaps
  ExtentMap(const ExtentMap&) = delete;
  ExtentMap& operator=(const ExtentMap&) = delete;

  // `bytes` of the extent from `offset`; valid until the next DropIdle. Empty: the extent is gone,
  // or of another tenant, or cannot be had now.
  std::span<const std::byte> Find(uint64_t serial, uint32_t offset, size_t bytes,
                                  std::span<const std::byte> ticket);
  void DropIdle();

  size_t extent_count() const { return extents_.size(); }
  // Why the last fetch failed; OK while all is well. After a failure nothing is fetched any more.
  const Status& status() const { return status_; }
  // Why extents are no longer registered: the device refused one. OK: they are, if at all.
  const Status& registration() const { return registration_; }

 private:
  struct Mapped {
    const std::byte* base = nullptr;
    TimePoint used;
  };
  ExtentMap(const Clock& clock, OwnedFd socket, gpu::PageIntake* intake)
      : clock_(clock), socket_(std::move(socket)), intake_(intake) {}
  void Unmap(const std::byte* base);
  Status Fetch(std::span<const std::byte> ticket, std::vector<uint64_t> serials);

  const Clock& clock_;
  const OwnedFd socket_;
  gpu::PageIntake* const intake_;
  std::map<uint64_t, Mapped> extents_;
  TimePoint last_drop_;
  Status status_;
  Status registration_;
};

}  // namespace icecache
