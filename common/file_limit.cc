#include "common/file_limit.h"

#include <fcntl.h>
#include <sys/resource.h>
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

// By opening them: counting those that are open takes time in proportion to their number.
Status CheckFileDescriptors(uint32_t needed) {
  std::vector<int> opened;
  for (uint32_t i = 0; i < needed; ++i) {
    const int fd = i == 0 ? ::open("/dev/null", O_RDONLY | O_CLOEXEC)
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
