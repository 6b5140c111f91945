// Host memory: HostBuffer, page-aligned and anonymous, for arenas and landing buffers;
// ScratchVector, a vector of many elements for a while.
//
// Zero-filled lazily by the kernel, so reserving far more than is used costs address space only.
// Owner-thread object: the memory may be shared, allocation and release may not race.
#pragma once

#include <cstddef>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "common/status.h"

namespace icecache {

class HostBuffer {
 public:
  HostBuffer() = default;  // empty
  ~HostBuffer();
  HostBuffer(HostBuffer&& other) noexcept;
  HostBuffer& operator=(HostBuffer&& other) noexcept;
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  // Reserves `bytes` (rounded up to whole memory pages, at least one) of zeroes and asks for huge
  // pages when the range is at least one huge page long. RESOURCE_EXHAUSTED naming the size when
  // refused.
  static Result<HostBuffer> Allocate(size_t bytes);

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  HostBuffer(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}
  void Release();

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Large blocks in huge pages: the first touch of a small page costs some microseconds, more than
// all that a build does with the keys in it. A thread keeps up to limits::kScratchKeptBytesMax of
// what it frees for its next blocks, whose content is therefore anything. Throws std::bad_alloc.
void* AllocateScratch(size_t bytes);
void FreeScratch(void* memory, size_t bytes);  // as many as were asked for; by any thread

template <typename T>
struct ScratchAllocator {
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(AllocateScratch(count * sizeof(T))); }
  void deallocate(T* memory, size_t count) { FreeScratch(memory, count * sizeof(T)); }
  // Without a value an element is left as it comes: what a pass writes first need not be cleared.
  template <typename U>
  void construct(U* element) {
    ::new (static_cast<void*>(element)) U;
  }
  template <typename U, typename... Args>
  void construct(U* element, Args&&... args) {
    ::new (static_cast<void*>(element)) U(std::forward<Args>(args)...);
  }
  bool operator==(const ScratchAllocator&) const = default;
};
// resize(n) and ScratchVector(n) leave new elements without a value.
template <typename T>
using ScratchVector = std::vector<T, ScratchAllocator<T>>;

}  // namespace icecache
