// AttentionBackend on a Device. Rows and pages may lie in any host memory: they are staged in
// pinned memory and copied, one copy and one or two launches per call, whatever the number of
// items. What already is on the device is read there (DeviceFrames, device_frames.h).
#pragma once

#include <memory>

#include "kernels/attention.h"
#include "kernels/gpu/device.h"

namespace icecache::gpu {

class DeviceFrames;

// How many blocks share the pages of each task, so that the device is busy: split-K. `tasks` of at
// most `pages` pages each.
uint32_t SplitsFor(uint32_t processors, uint32_t tasks, uint32_t pages);

// Borrows the device (and `frames`, which may be null). One thread.
std::unique_ptr<AttentionBackend> MakeGpuAttention(Device& device, DeviceFrames* frames);

}  // namespace icecache::gpu
