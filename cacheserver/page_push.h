// PagePush: writes pages of a shard straight into memory of workers' GPUs on this host (page way
// "ipc", docs/gpu.md). One thread per shard and GPU does what waits for the device, so that the
// shard's loop goes on.
//
//   1. Open   memory that a worker has offered; the target is the right to write there, and the
//             memory is let go with the last reference to it
//   2. Push   one launch gathers spans of extents into it; done when they are there
//
// The device reads extents through a mapping of their own, registered when a page of theirs is
// first pushed and let go after the extent: dropping one never waits for a device. Where the device
// registers no memory, rows are copied to pinned memory first. Owner's thread: the shard's; answers
// come there, on a later turn, and not after its end. Ends before shard and reactor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/store/page_pool.h"
#include "common/metrics.h"
#include "common/reactor.h"
#include "kernels/gpu/device.h"

namespace icecache {

// How a process that pushes gets to the device that some exported memory is of.
using MakePushDevice =
    std::function<Result<std::unique_ptr<gpu::Device>>(const gpu::MemoryHandle&)>;

// `name`: auto (GPUs, if there are any), off, or emulated. UNAVAILABLE says why nothing is pushed.
Status CheckPushName(const std::string& name);
Result<MakePushDevice> ChoosePushDevice(const std::string& name);

class PushTarget;  // memory of a worker, opened

// Bytes of an extent, and where they go.
struct PushSpan {
  uint64_t extent = 0;                // serial
  const std::byte* base = nullptr;    // of the extent, as the pool has mapped it
  std::span<const std::byte> rows{};  // within it
  uint32_t to = 0;                    // offset in the target
};

class PagePush {
 public:
  PagePush(PagePool& pool, Reactor& reactor, MetricsRegistry& metrics, MakePushDevice make);
  ~PagePush();  // waits for what has begun
  PagePush(const PagePush&) = delete;
  PagePush& operator=(const PagePush&) = delete;

  // INVALID_ARGUMENT: no handle, a forged one, or of more than kPushBytes. RESOURCE_EXHAUSTED:
  // kPushTargetsMax. UNAVAILABLE: another host's, or of a GPU that this process cannot use.
  using Opened = std::function<void(Result<std::shared_ptr<PushTarget>>)>;
  void Open(std::span<const std::byte> handle, Opened done);

  // So many bytes can be written; 0 while kPushesQueuedMax wait for the device.
  static uint64_t Room(const PushTarget& target);
  // REQUIRES: Room of the target. `pin` keeps the rows as they are until `done`. An error: what
  // lies there is undefined, and the target is of no more use.
  void Push(const std::shared_ptr<PushTarget>& target, const std::vector<PushSpan>& spans,
            std::shared_ptr<const void> pin, std::function<void(Status)> done);

  size_t registered_count() const { return views_.size(); }

 private:
  class Lane;
  friend class PushTarget;
  class ExtentView;
  Result<std::shared_ptr<Lane>> LaneOf(const gpu::MemoryHandle& handle);
  void DropIdle(Lane& lane);
  std::shared_ptr<const ExtentView> ViewOf(const PushSpan& span);

  PagePool& pool_;
  Reactor& reactor_;
  const MakePushDevice make_;
  Counter& bytes_;
  Histogram& seconds_;
  Gauge& targets_;
  std::vector<std::shared_ptr<Lane>> lanes_;
  std::map<uint64_t, std::shared_ptr<const ExtentView>> views_;  // by serial
  std::map<uint64_t, std::function<void(Status)>> pushing_;      // until their turn; they hold pins
  uint64_t next_push_ = 1;
  const std::shared_ptr<int> counted_ = std::make_shared<int>(0);  // held by each target
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
