// PushBuffer: memory of a worker's device that servers of this host push pages into (page way
// "ipc", docs/gpu.md). It belongs to the worker: a request lends a region of it, the server writes
// there before it replies and nowhere else, and the region comes back when nobody looks at it any
// more. A server that is late, or lies, spoils pages that are verified where they are copied to; so
// nothing depends on its keeping to that.
//
//   1. Offer     allocates and names the memory; the name goes to each server
//   2. Reserve   a region for one reply; it is free again when the last reference to it goes
//
// One thread, the device's. Ends before the device; regions may outlive it, and point nowhere then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "common/limits.h"
#include "kernels/gpu/device.h"

namespace icecache::gpu {

// [offset, offset + bytes) of the buffer.
struct PushRegion {
  uint32_t offset = 0;
  uint32_t bytes = 0;
  const std::byte* buffer = nullptr;  // on the device
};

class PushBuffer {
 public:
  explicit PushBuffer(Device& device, size_t bytes = limits::kPushBytes)
      : device_(device), bytes_(bytes) {}
  PushBuffer(const PushBuffer&) = delete;
  PushBuffer& operator=(const PushBuffer&) = delete;

  // RESOURCE_EXHAUSTED: no room on the device. The same name each time.
  Result<std::vector<std::byte>> Offer();

  // As much of `bytes` as there is in one piece, at most kPushRegionBytesMax; null: nothing is
  // free, or offered.
  std::shared_ptr<const PushRegion> Reserve(size_t bytes);

  uint64_t free_bytes() const;

 private:
  using Free = std::map<uint32_t, uint32_t>;  // bytes by offset; neighbours are one piece
  static void GiveBack(const PushRegion& region, Free* free);

  Device& device_;
  const size_t bytes_;
  DeviceMemory memory_;
  std::vector<std::byte> handle_;
  const std::shared_ptr<Free> free_ = std::make_shared<Free>();
};

}  // namespace icecache::gpu
