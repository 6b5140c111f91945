// DeviceFrames: memory for page frames that attention on the device reads. Either on the device
// alone, filled and verified there (PageIntake, page_intake.h), or twice, in pinned host memory and
// on the device, at the same offsets: a page is verified in its host frame and then copied. Nothing
// unverified reaches attention, and a page that stays costs the bus nothing.
//
//   1. AllocateChunk   host memory; the device's twin comes with it
//   2. write a host frame that is not being copied (AwaitCopies), MarkDirty the bytes
//   3. QueueCopies     before attention: one launch gathers all dirty bytes over the bus
//
// Bounded by the device's memory (--gpu-memory). One thread.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <vector>

#include "kernels/gpu/device.h"

namespace icecache::gpu {

class DeviceFrames {
 public:
  explicit DeviceFrames(Device& device) : device_(device) {}

  // Host memory that lives as long as this object. RESOURCE_EXHAUSTED when either side is full.
  Result<std::byte*> AllocateChunk(size_t bytes);

  // Memory of the device that lives as long as this object: its own twin. First of what is shared.
  Result<std::byte*> AllocateOnDevice(size_t bytes);

  // Takes memory that other processes may open (Device::Export) for what AllocateOnDevice gives
  // next. Once, before the first chunk. RESOURCE_EXHAUSTED.
  Result<std::span<const std::byte>> Share(size_t bytes);

  // Host bytes of a chunk were written. Spans of 16-byte aligned ends are fastest. The number of
  // the QueueCopies that will copy them.
  uint64_t MarkDirty(const std::byte* host, size_t bytes);

  // Queues the copy of everything dirty, by a list that is written to `list`: pinned memory, which
  // grows and belongs to the copy until the next Synchronize, as do the host bytes.
  Status QueueCopies(DeviceMemory* list);

  // Host bytes that this QueueCopies copies may be written: waits for it if it is queued and the
  // device was not synchronized since. An error comes out of the next QueueCopies.
  void AwaitCopies(uint64_t number);

  // The device's twin of host memory, or memory of AllocateOnDevice itself; null when it is
  // neither.
  const std::byte* OnDevice(const std::byte* host) const;

  uint64_t bytes() const { return bytes_; }

 private:
  struct Chunk {
    DeviceMemory host, twin;  // no host: on the device alone
  };
  const Chunk* Find(const std::byte* host) const;

  Device& device_;
  std::map<const std::byte*, Chunk> chunks_;  // by first host byte, or the device's
  uint64_t bytes_ = 0;
  std::span<std::byte> shared_;  // and not given yet
  std::vector<CopySpan> dirty_;
  uint64_t next_copies_ = 1;       // the number of the next QueueCopies
  uint64_t first_queued_ = 1;      // of those since the last Synchronize that was seen
  uint64_t seen_synchronize_ = 0;  // its count
  Status failed_;
};

}  // namespace icecache::gpu
