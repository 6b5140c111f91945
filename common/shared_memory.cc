#include "common/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <random>
#include <string>

namespace icecache {
namespace {

std::string FileName(const SharedMemoryName& name) {
  return "icecache-shared-" + std::to_string(name.nonce[0]) + "-" + std::to_string(name.nonce[1]);
}

std::string NotThere(uint64_t bytes) {
  return "a forged name: no shared memory of " + std::to_string(bytes) + " bytes";
}

// A descriptor of what a stranger names, if it is a memfd of this name.
Result<int> OpenNamed(const SharedMemoryName& name, SharedMemory::Access access) {
  const std::string path =
      "/proc/" + std::to_string(name.process) + "/fd/" + std::to_string(name.descriptor);
  const int found = ::open(path.c_str(), O_PATH | O_CLOEXEC);  // whatever it is, it is not touched
  if (found < 0) {
    return Unavailable("the process that shared the memory is gone, or hidden from this one");
  }
  const std::string mine = "/proc/self/fd/" + std::to_string(found);
  char target[256] = {};
  const bool named = ::readlink(mine.c_str(), target, sizeof(target) - 1) > 0 &&
                     target == "/memfd:" + FileName(name) + " (deleted)";
  const int mode = access == SharedMemory::Access::kWrite ? O_RDWR : O_RDONLY;
  const int fd = named ? ::open(mine.c_str(), mode | O_CLOEXEC) : -1;
  ::close(found);
  if (fd < 0) return InvalidArgument(NotThere(name.bytes));
  return fd;
}

}  // namespace

void SharedMemory::Reset() {
  if (!memory_.empty()) ::munmap(memory_.data(), memory_.size());
  if (name_.descriptor >= 0) ::close(name_.descriptor);
  memory_ = {};
  name_ = {};
}

Result<SharedMemory> SharedMemory::Make(size_t bytes) {
  KV_CHECK(bytes > 0);
  SharedMemory shared;
  std::random_device random;
  SharedMemoryName& name = shared.name_;
  name.process = ::getpid();
  for (uint64_t& word : name.nonce) word = uint64_t{random()} << 32 | random();
  name.bytes = bytes;
  name.descriptor = ::memfd_create(FileName(name).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (name.descriptor < 0) return ResourceExhausted("a descriptor for shared memory");
  void* memory = MAP_FAILED;
  if (::ftruncate(name.descriptor, static_cast<off_t>(bytes)) == 0 &&
      ::fcntl(name.descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, name.descriptor, 0);
  }
  if (memory == MAP_FAILED) {
    return ResourceExhausted(std::to_string(bytes) + " bytes of shared memory");
  }
  shared.memory_ = {static_cast<std::byte*>(memory), bytes};
  return shared;
}

Result<SharedMemory> SharedMemory::Open(const SharedMemoryName& name, Access access) {
  KV_ASSIGN_OR_RETURN(const int fd, OpenNamed(name, access));
  struct stat status {};
  const bool right = ::fstat(fd, &status) == 0 && name.bytes > 0 &&
                     static_cast<uint64_t>(status.st_size) == name.bytes &&
                     (::fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) != 0;
  const int protection = PROT_READ | (access == Access::kWrite ? PROT_WRITE : 0);
  void* const memory =
      right ? ::mmap(nullptr, name.bytes, protection, MAP_SHARED, fd, 0) : MAP_FAILED;
  ::close(fd);
  if (!right) return InvalidArgument(NotThere(name.bytes));
  if (memory == MAP_FAILED) return ResourceExhausted("room to map shared memory");
  SharedMemory shared;
  shared.memory_ = {static_cast<std::byte*>(memory), name.bytes};
  return shared;
}

}  // namespace icecache
