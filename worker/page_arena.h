// PageArena: memory for the page frames of a worker's caches, on the host, on a device, or both.
// Owner's thread: the decode thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace icecache {

namespace gpu {
class DeviceFrames;
class PageIntake;
}  // namespace gpu

// Page frames for all caches of a worker: grows by chunks, gives nothing back before its end. With
// `frames` they are on a device as well, or, with `intake`, there alone, until the device is full;
// pages in frames of the host's are copied there for each step.
class PageArena {
 public:
  explicit PageArena(size_t frame_bytes, gpu::DeviceFrames* frames = nullptr,
                     gpu::PageIntake* intake = nullptr)
      : frame_bytes_(frame_bytes), frames_(frames), intake_(intake), room_(frames != nullptr) {}
  std::byte* Allocate();
  void Free(std::byte* frame) { free_.push_back(frame); }
  // Whether only the device may touch the frame: pages come into it through intake().
  bool on_device(const std::byte* frame) const;
  gpu::PageIntake& intake() const { return *intake_; }
  // A page in a frame of the host's was verified: these bytes of it are new. What to await before
  // it is written again, as it may still be on its way to the device.
  uint64_t Written(const std::byte* at, size_t bytes);
  void AwaitCopies(uint64_t written);
  uint64_t bytes() const { return chunk_count_ * kFramesPerChunk * frame_bytes_; }

 private:
  static constexpr size_t kFramesPerChunk = 32;
  std::byte* AllocateChunk(size_t bytes);

  const size_t frame_bytes_;
  gpu::DeviceFrames* const frames_;
  gpu::PageIntake* const intake_;
  bool room_;  // on the device, as far as we know
  size_t chunk_count_ = 0;
  std::vector<std::unique_ptr<std::byte[]>> chunks_;
  std::vector<std::byte*> free_;
};

}  // namespace icecache
