// What measurements on a device share: the device by name, times of queued work, and the two rulers
// of every figure, a device's own copy and an empty launch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kernels/gpu/device.h"

namespace icecache {

// cuda or emulated. UNAVAILABLE says why there is no GPU; INVALID_ARGUMENT for other names.
Result<std::unique_ptr<gpu::Device>> BenchDevice(const std::string& name);

struct DeviceTimes {
  double p50_us = 0;
  double p99_us = 0;
};

// Per call of `queue`, which only queues: as many calls in a row as take about a millisecond, then
// one wait, so that neither the wait nor the host's clock shows.
Result<DeviceTimes> TimeQueued(gpu::Device& device, uint32_t rounds,
                               const std::function<void()>& queue);
// One call and one wait: what somebody who needs the result sees.
Result<DeviceTimes> TimeWaited(gpu::Device& device, uint32_t rounds,
                               const std::function<void()>& queue);

// Bytes read and written per time by a copy of 256 MiB within the device (smaller on the emulator).
Result<double> DeviceCopyGBs(gpu::Device& device);
Result<double> EmptyLaunchMicros(gpu::Device& device);

// "32k" or "32768".
Result<uint32_t> ParseTokenCount(const std::string& text);

}  // namespace icecache
