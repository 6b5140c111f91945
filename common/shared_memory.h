// SharedMemory: memory that processes of this host share by name, without a file system and without
// anything left behind: a memfd, which ends with the last process that has it mapped, however that
// ends. Its size is sealed, so that nobody who has it open can cut it short under the others.
//
// The name holds 128 random bits and says which descriptor of which process it is; it opens from
// processes of the same user (and pid namespace) that were told it. What a stranger names is opened
// only when it proves to be such memory. Move only; unmaps at its end. Any thread, one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "common/status.h"

namespace icecache {

// Travels as it is: both sides are of one machine.
struct SharedMemoryName {
  int32_t process = 0, descriptor = -1;
  uint64_t nonce[2] = {};
  uint64_t bytes = 0;
};

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory() { Reset(); }
  SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    if (this == &other) return *this;
    Reset();
    memory_ = std::exchange(other.memory_, {});
    name_ = std::exchange(other.name_, {});
    return *this;
  }

  // Zeros. RESOURCE_EXHAUSTED: no descriptor, or not so much memory.
  static Result<SharedMemory> Make(size_t bytes);
  enum class Access : uint8_t { kRead, kWrite };  // kWrite reads, too
  // INVALID_ARGUMENT: a forged name. UNAVAILABLE: the process that made the memory is gone, or
  // hidden from this one. What is open stays when that process ends.
  static Result<SharedMemory> Open(const SharedMemoryName& name, Access access);

  std::span<std::byte> bytes() const { return memory_; }  // of kRead: not to be written
  const SharedMemoryName& name() const { return name_; }  // of Make's

 private:
  void Reset();

  std::span<std::byte> memory_;
  SharedMemoryName name_;  // without a descriptor: opened
};

}  // namespace icecache
