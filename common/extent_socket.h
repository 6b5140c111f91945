// The socket over which a cache server lends a worker on the same host the memory that its pages
// stand in: unix, abstract name, one message per request and reply, descriptors beside the reply.
//
//   request   ticket, and the serials wanted (none: all that there are)
//   reply     an error code, or the serials that exist of those wanted, a descriptor for each
//
// What is lent can only be mapped read-only: descriptors are opened for reading and the memory is
// sealed against writable mappings (PagePool). Who may have what is the server's to decide; this is
// the wire alone. Nothing in a message is trusted: counts and lengths are checked before use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"

namespace icecache {

// Closes what it holds. Moves, does not copy.
class OwnedFd {
 public:
  OwnedFd() = default;
  explicit OwnedFd(int fd) : fd_(fd) {}
  OwnedFd(OwnedFd&& other) noexcept : fd_(other.Release()) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  ~OwnedFd();
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release();

 private:
  int fd_ = -1;
};

struct ExtentRequest {
  std::vector<std::byte> ticket;
  std::vector<uint64_t> serials;  // at most kExtentsPerReplyMax; empty: all, as many as fit
};
struct LentExtent {
  uint64_t serial = 0;
  OwnedFd fd;
};

// A name that nobody else has and nobody guesses (128 random bits).
std::string FreshExtentSocketName();
// Does not block. UNAVAILABLE with the reason where unix sockets are not to be had.
Result<OwnedFd> ListenExtents(const std::string& name);
// The next waiting connection, which does not block either; invalid when there is none.
OwnedFd AcceptExtents(int listener);
// UNAVAILABLE: nobody listens under this name here: another host, or another network namespace.
Result<OwnedFd> ConnectExtents(const std::string& name);

Status SendExtentRequest(int fd, const ExtentRequest& request);
// UNAVAILABLE: the peer has gone, or nothing has come. INVALID_ARGUMENT: not a request.
Result<ExtentRequest> ReceiveExtentRequest(int fd);
// `fds` stay the caller's.
Status SendExtents(int fd, StatusCode code, std::span<const uint64_t> serials,
                   std::span<const int> fds);
// Waits, at most so long. The peer's refusal comes as its code; DATA_LOSS: not a reply.
Result<std::vector<LentExtent>> ReceiveExtents(int fd, Duration at_most);

}  // namespace icecache
