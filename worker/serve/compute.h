// Where a worker computes: the CPU, or a GPU with the page frames and the attention that belong to
// it. Chosen once, at start, with a line in the log that says why.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "common/status.h"
#include "kernels/attention.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/gpu/push_buffer.h"
#include "worker/page_sharing.h"
#include "worker/shard_link.h"

namespace icecache {

struct Compute {
  std::unique_ptr<gpu::Device> device;        // null: the CPU
  std::unique_ptr<gpu::DeviceFrames> frames;  // likewise
  std::unique_ptr<gpu::PageIntake> intake;  // null in way frames, and where there is no room for it
  std::unique_ptr<gpu::PushBuffer> push;    // null in the ways that have no use for it
  std::unique_ptr<PageSharing> sharing;     // null unless pages are shared
  PageWay way = PageWay::kAuto;             // as asked for
  std::unique_ptr<AttentionBackend> attention;

  // Shares so many bytes of page frames with other workers, or says in the log why not. Before the
  // first page.
  void SharePages(const ModelShape& shape, uint64_t bytes);
  DevicePages pages() const { return {device != nullptr, way, intake.get(), push.get()}; }
};

// INVALID_ARGUMENT unless auto, cpu, cuda or emulated (a slow imitation of a GPU, for tests).
Status CheckDeviceName(const std::string& name);

// auto: the first GPU, else the CPU, whatever the reason. cuda: UNAVAILABLE without a GPU.
// `gpu_memory` bounds what is allocated there; 0: nine tenths of what is free.
Result<Compute> ChooseCompute(const std::string& name, uint64_t gpu_memory, PageWay way);

}  // namespace icecache
