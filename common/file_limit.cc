#include "common/file_limit.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace icecache {

uint64_t RaiseFileLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return 0;
  const rlimit raised{limit.rlim_max, limit.rlim_max};
  return ::setrlimit(RLIMIT_NOFILE, &raised) == 0 ? raised.rlim_cur : limit.rlim_cur;
}

// By opening them: counting those that are open takes time in proportion to their number. Sockets,
// because UCX of another process may try to attach what has one of these numbers, and cannot.
Status CheckFileDescriptors(uint32_t needed) {
  std::vector<int> opened;
  for (uint32_t i = 0; i < needed; ++i) {
    const int fd = i == 0 ? ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)
                          : ::fcntl(opened.front(), F_DUPFD_CLOEXEC, 0);
    if (fd < 0) break;
    opened.push_back(fd);
  }
  for (const int fd : opened) ::close(fd);
  if (opened.size() == needed) return OkStatus();
  rlimit limit{};
  (void)::getrlimit(RLIMIT_NOFILE, &limit);
  return ResourceExhausted(std::to_string(opened.size()) + " file descriptors are left of " +
                           std::to_string(limit.rlim_cur) + ", " + std::to_string(needed) +
                           " are needed: raise the limit (ulimit -n; systemd: LimitNOFILE=; docker "
                           "run --ulimit nofile=)");
}

}  // namespace icecache
