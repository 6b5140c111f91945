#include "kernels/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

namespace icecache {

namespace {
constexpr size_t kHugePageBytes = size_t{2} << 20;
}

HostBuffer::~HostBuffer() { Release(); }

HostBuffer::HostBuffer(HostBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  if (this != &other) {
    Release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

Result<HostBuffer> HostBuffer::Allocate(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<size_t>::max() - page)
    return InvalidArgument("host buffer of " + std::to_string(bytes) + " bytes overflows");
  const size_t rounded = std::max(page, (bytes + page - 1) / page * page);
  void* p = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    return ResourceExhausted("host buffer of " + std::to_string(rounded) +
                             " bytes: " + std::strerror(errno) +
                             "; lower --memory-size or raise the process's memory limit");
  }
  // A hint: without huge pages the buffer works, with more TLB misses.
  if (rounded >= kHugePageBytes) (void)madvise(p, rounded, MADV_HUGEPAGE);
  return HostBuffer(static_cast<std::byte*>(p), rounded);
}

void HostBuffer::Release() {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace icecache
