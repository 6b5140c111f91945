#include "tests/bench/device_timing.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <vector>

#include "common/limits.h"
#include "tests/bench/measure.h"

namespace icecache {
namespace {

using gpu::DeviceMemory;
using gpu::MemoryKind;

double MicrosSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

Result<double> TimeCalls(gpu::Device& device, uint32_t calls, const std::function<void()>& queue) {
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < calls; ++i) queue();
  KV_RETURN_IF_ERROR(device.Synchronize());
  return MicrosSince(start) / calls;
}

Result<DeviceTimes> TimeRounds(gpu::Device& device, uint32_t rounds, uint32_t calls,
                               const std::function<void()>& queue) {
  std::vector<double> times;
  for (uint32_t i = 0; i < rounds; ++i) {
    KV_ASSIGN_OR_RETURN(const double micros, TimeCalls(device, calls, queue));
    times.push_back(micros);
  }
  return DeviceTimes{Quantile(times, 0.5), Quantile(times, 0.99)};
}

}  // namespace

Result<std::unique_ptr<gpu::Device>> BenchDevice(const std::string& name) {
  if (name == "emulated") return gpu::MakeEmulatedDevice({});
  if (name == "cuda") return gpu::MakeCudaDevice({});
  return InvalidArgument("device '" + name + "', expected cuda or emulated");
}

Result<DeviceTimes> TimeQueued(gpu::Device& device, uint32_t rounds,
                               const std::function<void()>& queue) {
  KV_RETURN_IF_ERROR(TimeCalls(device, 1, queue).status());  // caches, clocks, lazy loading
  KV_ASSIGN_OR_RETURN(const double once, TimeCalls(device, 1, queue));
  const auto calls = static_cast<uint32_t>(std::clamp(1000.0 / once, 1.0, 200.0));
  return TimeRounds(device, rounds, calls, queue);
}

Result<DeviceTimes> TimeWaited(gpu::Device& device, uint32_t rounds,
                               const std::function<void()>& queue) {
  KV_RETURN_IF_ERROR(TimeCalls(device, 1, queue).status());
  return TimeRounds(device, rounds, 1, queue);
}

Result<double> DeviceCopyGBs(gpu::Device& device) {
  const size_t bytes = size_t{device.info().name == "emulated" ? 4u : 256u} << 20;
  KV_ASSIGN_OR_RETURN(const auto from, DeviceMemory::Allocate(device, MemoryKind::kDevice, bytes));
  KV_ASSIGN_OR_RETURN(const auto to, DeviceMemory::Allocate(device, MemoryKind::kDevice, bytes));
  KV_ASSIGN_OR_RETURN(const DeviceTimes times,
                      TimeQueued(device, 20, [&] { device.Copy(to.data(), from.data(), bytes); }));
  return 2.0 * static_cast<double>(bytes) / times.p50_us / 1e3;
}

Result<double> EmptyLaunchMicros(gpu::Device& device) {
  KV_ASSIGN_OR_RETURN(const auto memory, DeviceMemory::Allocate(device, MemoryKind::kDevice, 256));
  const gpu::CopySpan nothing{memory.data(), memory.data(), 0};
  KV_ASSIGN_OR_RETURN(const auto spans, DeviceMemory::Allocate(device, MemoryKind::kDevice, 256));
  device.Copy(spans.data(), &nothing, sizeof(nothing));
  KV_RETURN_IF_ERROR(device.Synchronize());
  const gpu::CopyArgs args{spans.data<gpu::CopySpan>(), 1};
  KV_ASSIGN_OR_RETURN(const DeviceTimes times,
                      TimeQueued(device, 20, [&] { device.Launch(args); }));
  return times.p50_us;
}

Result<uint32_t> ParseTokenCount(const std::string& text) {
  char* end = nullptr;
  const unsigned long number = std::strtoul(text.c_str(), &end, 10);
  const bool kilo = *end == 'k';
  const unsigned long tokens = kilo ? number * 1024 : number;
  if (end == text.c_str() || *(end + (kilo ? 1 : 0)) != '\0' || tokens < 16 ||
      tokens > limits::kContextTokensMax) {
    return InvalidArgument("'" + text + "', expected 16 to " +
                           std::to_string(limits::kContextTokensMax) + " tokens, like 32k");
  }
  return static_cast<uint32_t>(tokens);
}

}  // namespace icecache
