#include "kernels/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "common/limits.h"

namespace icecache {

namespace {
constexpr size_t kHugePageBytes = size_t{2} << 20;
// From here on malloc would map fresh memory, too, in small pages.
constexpr size_t kScratchHugeMin = size_t{1} << 17;

size_t WholeHugePages(size_t bytes) {
  return (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
}
}  // namespace

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

namespace {

// What a thread has freed, whole huge pages in order of address; neighbours are one.
class KeptScratch {
 public:
  ~KeptScratch() {
    for (const auto& [at, bytes] : kept_) munmap(at, bytes);
  }

  // The start of the smallest block that is large enough, or null.
  void* Take(size_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->second >= bytes && (best == kept_.end() || block->second < best->second))
        best = block;
    }
    if (best == kept_.end()) return nullptr;
    const auto [at, all] = *best;
    kept_.erase(best);
    if (all > bytes) kept_.emplace(at + bytes, all - bytes);
    bytes_ -= bytes;
    return at;
  }

  // False when there is enough.
  bool Keep(void* memory, size_t bytes) {
    if (bytes_ + bytes > limits::kScratchKeptBytesMax) return false;
    auto block = kept_.emplace(static_cast<std::byte*>(memory), bytes).first;
    bytes_ += bytes;
    if (block != kept_.begin()) {
      const auto before = std::prev(block);
      if (Join(before, block)) block = before;
    }
    if (const auto next = std::next(block); next != kept_.end()) Join(block, next);
    return true;
  }

 private:
  using Blocks = std::map<std::byte*, size_t>;

  bool Join(Blocks::iterator block, Blocks::iterator next) {
    if (block->first + block->second != next->first) return false;
    block->second += next->second;
    kept_.erase(next);
    return true;
  }

  Blocks kept_;
  size_t bytes_ = 0;
};

thread_local KeptScratch kept_scratch;

}  // namespace

// Straight from the kernel, so that malloc's own thresholds stay where they are.
void* AllocateScratch(size_t bytes) {
  if (bytes < kScratchHugeMin) return ::operator new(bytes);
  const size_t rounded = WholeHugePages(bytes), mapped = rounded + kHugePageBytes;
  if (void* const kept = kept_scratch.Take(rounded); kept != nullptr) return kept;
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  auto* const first = static_cast<std::byte*>(p);
  const size_t lead = WholeHugePages(reinterpret_cast<size_t>(first)) - reinterpret_cast<size_t>(p);
  if (lead > 0) munmap(first, lead);
  if (lead < kHugePageBytes) munmap(first + lead + rounded, kHugePageBytes - lead);
  (void)madvise(first + lead, rounded, MADV_HUGEPAGE);
  return first + lead;
}

void FreeScratch(void* memory, size_t bytes) {
  if (bytes < kScratchHugeMin) {
    ::operator delete(memory);
  } else if (const size_t rounded = WholeHugePages(bytes); !kept_scratch.Keep(memory, rounded)) {
    munmap(memory, rounded);
  }
}

}  // namespace icecache
