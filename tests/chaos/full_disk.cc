// A disk that is full, for a process that preloads this (LD_PRELOAD): while the file
// $CHAOS_DISK_FULL exists, writes to files under $CHAOS_DISK succeed for some bytes more, as on a
// real disk often in the middle of a record, and then fail with ENOSPC. Needs no privileges, unlike
// a small file system.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr long kLeftBytes = 3000;  // of free space, when it becomes full

bool Full() {
  static const char* const flag = std::getenv("CHAOS_DISK_FULL");
  return flag != nullptr && access(flag, F_OK) == 0;
}

bool OnTheDisk(int fd) {
  static const char* const disk = std::getenv("CHAOS_DISK");
  if (disk == nullptr) return false;
  char link[32], path[4096];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path);
  const size_t prefix = std::strlen(disk);
  return length > static_cast<ssize_t>(prefix) && std::memcmp(path, disk, prefix) == 0;
}

// How many of `bytes` can be written to `fd`; -1 with errno: none.
ssize_t Room(int fd, size_t bytes) {
  static std::atomic<long> left{kLeftBytes};
  const auto wanted = static_cast<long>(bytes);
  const int before = errno;
  const bool full = Full();
  if (!full) left = kLeftBytes;
  if (!full || !OnTheDisk(fd)) {
    errno = before;
    return wanted;
  }
  const long room = std::clamp<long>(left.fetch_sub(wanted), 0, wanted);
  errno = ENOSPC;
  return room == 0 && wanted > 0 ? -1 : room;
}

template <typename Function>
Function Next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ssize_t write(int fd, const void* data, size_t bytes) {
  static const auto real = Next<ssize_t (*)(int, const void*, size_t)>("write");
  const ssize_t room = Room(fd, bytes);
  return room < 0 ? -1 : real(fd, data, static_cast<size_t>(room));
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t at) {
  static const auto real = Next<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite");
  const ssize_t room = Room(fd, bytes);
  return room < 0 ? -1 : real(fd, data, static_cast<size_t>(room), at);
}

ssize_t pwrite64(int fd, const void* data, size_t bytes, off64_t at) {
  static const auto real = Next<ssize_t (*)(int, const void*, size_t, off64_t)>("pwrite64");
  const ssize_t room = Room(fd, bytes);
  return room < 0 ? -1 : real(fd, data, static_cast<size_t>(room), at);
}

}  // extern "C"
