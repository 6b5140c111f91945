#include "common/ucx_peer.h"

#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "common/limits.h"

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

// Until it returns false. Descriptors that other threads close meanwhile are visited and are gone.
void VisitDescriptors(const std::function<bool(int fd)>& visit) {
  const std::unique_ptr<DIR, int (*)(DIR*)> all(opendir("/proc/self/fd"), closedir);
  if (all == nullptr) return;
  while (const dirent* entry = readdir(all.get())) {
    if (entry->d_name[0] != '.' && !visit(std::atoi(entry->d_name))) return;
  }
}

// Made before any number becomes free, or it would take the first.
int Placeholder() {
  static const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  return fd;
}

bool IsUcxMemory(int fd) {
  constexpr std::string_view kPrefix = "/dev/shm/ucx_shm_posix";
  char path[64];
  const ssize_t length =
      readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof path);
  return length > 0 && std::string_view(path, static_cast<size_t>(length)).starts_with(kPrefix);
}

}  // namespace

bool PeerHasClosed(const sockaddr_storage& peer) {
  bool closed = false;
  VisitDescriptors([&](int fd) {
    sockaddr_storage other{};
    socklen_t length = sizeof other;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&other), &length) != 0) return true;
    if (!SameAddress(peer, other)) return true;
    pollfd wait{fd, POLLRDHUP, 0};
    closed = poll(&wait, 1, 0) > 0 && (wait.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
    return false;
  });
  return closed;
}

std::vector<int> UcxMemoryDescriptors() {
  (void)Placeholder();
  std::vector<int> open;
  VisitDescriptors([&](int fd) {
    if (IsUcxMemory(fd)) open.push_back(fd);
    return true;
  });
  return open;
}

void KeepNumbers(const std::vector<int>& were_open) {
  using Clock = std::chrono::steady_clock;
  static std::mutex mutex;
  static std::deque<std::pair<Clock::time_point, int>> kept;  // oldest first
  const std::lock_guard lock(mutex);
  const auto now = Clock::now();
  for (const int fd : were_open) {
    if (IsUcxMemory(fd)) continue;
    const int number = fcntl(Placeholder(), F_DUPFD_CLOEXEC, fd);
    if (number == fd) {
      kept.emplace_back(now, fd);
    } else if (number >= 0) {
      close(number);
    }
  }
  while (!kept.empty() && (kept.size() > limits::kNumbersKeptMax ||
                           now - kept.front().first > limits::kNumbersKeptTime)) {
    close(kept.front().second);
    kept.pop_front();
  }
}

}  // namespace icecache
