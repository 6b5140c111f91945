#include "worker/model/file_bytes.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace icecache {
namespace {

Status SystemError(const std::string& path, const char* action, int error) {
  std::string message = path + ": cannot " + action + ": " + std::strerror(error);
  if (error == ENOENT || error == ENOTDIR) return NotFound(std::move(message));
  if (error == EACCES || error == EPERM) return PermissionDenied(std::move(message));
  return Internal(std::move(message));
}

}  // namespace

Result<std::unique_ptr<FileBytes>> FileBytes::Map(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return SystemError(path, "open", errno);
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    const int error = errno;
    close(fd);
    if (!S_ISREG(info.st_mode)) return InvalidArgument(path + ": not a regular file");
    return SystemError(path, "stat", error);
  }
  const auto size = static_cast<size_t>(info.st_size);
  if (size == 0) {  // mmap refuses a length of 0
    close(fd);
    return std::unique_ptr<FileBytes>(new FileBytes(path, {}));
  }
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (address == MAP_FAILED) return SystemError(path, "map", error);
  return std::unique_ptr<FileBytes>(
      new FileBytes(path, {static_cast<const std::byte*>(address), size}));
}

FileBytes::~FileBytes() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

bool FileExists(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

}  // namespace icecache
