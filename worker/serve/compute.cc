#include "worker/serve/compute.h"

#include <utility>

#include "common/log.h"
#include "common/size.h"
#include "kernels/gpu/attention_gpu.h"

namespace icecache {
namespace {

Compute OnDevice(std::unique_ptr<gpu::Device> device, PageWay way) {
  Compute compute;
  compute.device = std::move(device);
  compute.frames = std::make_unique<gpu::DeviceFrames>(*compute.device);
  compute.way = way;
  if (way != PageWay::kFrames) {
    Result<std::unique_ptr<gpu::PageIntake>> intake = gpu::PageIntake::Make(*compute.device);
    if (intake.ok()) {
      compute.intake = std::move(*intake);
      if (way == PageWay::kAuto || way >= PageWay::kIpc) {
        compute.push = std::make_unique<gpu::PushBuffer>(*compute.device);
      }
    } else {
      LogWarn("no landing buffer for pages", {{"reason", intake.status().ToString()}});
    }
  }
  compute.attention = gpu::MakeGpuAttention(*compute.device, compute.frames.get());
  LogInfo("computing on a device",
          {{"device", compute.device->info().name},
           {"memory", FormatSize(compute.device->info().memory_bytes_max)}});
  return compute;
}

}  // namespace

void Compute::SharePages(const ModelShape& shape, uint64_t bytes) {
  const auto shared = [&]() -> Result<std::unique_ptr<PageSharing>> {
    if (device == nullptr)
      return Unavailable("pages are shared between devices, and this is a CPU");
    if (intake == nullptr) {
      return Unavailable("page way " + std::string(PageWayName(PageWay::kFrames)) +
                         " keeps pages on the host");
    }
    return PageSharing::Make(*device, *frames, shape, bytes);
  };
  Result<std::unique_ptr<PageSharing>> made = shared();
  if (made.ok()) {
    sharing = std::move(*made);
    return;
  }
  LogWarn("page sharing", {{"on", "no"}, {"reason", made.status().message()}});
}

Status CheckDeviceName(const std::string& name) {
  for (const char* known : {"auto", "cpu", "cuda", "emulated"}) {
    if (name == known) return OkStatus();
  }
  return InvalidArgument("'" + name + "', expected auto, cpu or cuda");
}

Result<Compute> ChooseCompute(const std::string& name, uint64_t gpu_memory, PageWay way) {
  KV_RETURN_IF_ERROR(CheckDeviceName(name));
  if (name == "emulated") {
    gpu::EmulatedDeviceOptions options;
    if (gpu_memory > 0) options.memory_bytes_max = gpu_memory;
    return OnDevice(gpu::MakeEmulatedDevice(options), way);
  }
  if (name != "cpu") {
    gpu::CudaDeviceOptions options;
    options.memory_bytes_max = gpu_memory;
    auto device = gpu::MakeCudaDevice(options);
    if (device.ok()) return OnDevice(std::move(*device), way);
    if (name == "cuda") return device.status().WithContext("--device cuda");
    LogWarn("computing on the CPU (--device cpu says so without asking)",
            {{"reason", device.status().message()}});
  }
  Compute compute;
  compute.attention = MakeCpuAttention();
  return compute;
}

}  // namespace icecache
