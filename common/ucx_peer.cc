#include "common/ucx_peer.h"

#include <dirent.h>
#include <netinet/in.h>
#include <poll.h>

#include <cstdlib>
#include <cstring>
#include <memory>

namespace icecache {
namespace {

bool SameAddress(const sockaddr_storage& a, const sockaddr_storage& b) {
  if (a.ss_family != b.ss_family) return false;
  if (a.ss_family == AF_INET) {
    const auto& x = reinterpret_cast<const sockaddr_in&>(a);
    const auto& y = reinterpret_cast<const sockaddr_in&>(b);
    return x.sin_port == y.sin_port && x.sin_addr.s_addr == y.sin_addr.s_addr;
  }
  if (a.ss_family != AF_INET6) return false;
  const auto& x = reinterpret_cast<const sockaddr_in6&>(a);
  const auto& y = reinterpret_cast<const sockaddr_in6&>(b);
  return x.sin6_port == y.sin6_port &&
         std::memcmp(&x.sin6_addr, &y.sin6_addr, sizeof x.sin6_addr) == 0;
}

}  // namespace

bool PeerHasClosed(const sockaddr_storage& peer) {
  const std::unique_ptr<DIR, int (*)(DIR*)> all(opendir("/proc/self/fd"), closedir);
  if (all == nullptr) return false;
  while (const dirent* entry = readdir(all.get())) {
    const int fd = std::atoi(entry->d_name);
    sockaddr_storage other{};
    socklen_t length = sizeof other;
    // Descriptors that other threads close meanwhile fail here.
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&other), &length) != 0) continue;
    if (!SameAddress(peer, other)) continue;
    pollfd wait{fd, POLLRDHUP, 0};
    return poll(&wait, 1, 0) > 0 && (wait.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
  }
  return false;
}

}  // namespace icecache
