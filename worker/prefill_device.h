// Dense causal attention of prefill on a Device: model/prefill_attention.h's counterpart. One
// layer's K and V are kept on the device as they grow, rounded as they will be stored; queries and
// outputs cross the bus. Cost there: 8 bytes per query element per block, which on PCIe 5 is of the
// order of the products themselves. Owner's thread.
#pragma once

#include <vector>

#include "kernels/gpu/attend.h"
#include "kernels/gpu/device.h"
#include "worker/layer_rows.h"

namespace icecache {

class DevicePrefill {
 public:
  // For up to `total` tokens. Borrows the device.
  DevicePrefill(gpu::Device& device, const ModelShape& shape, uint32_t total);

  // Takes rows [first, first + tokens) of the layer into the device and attends: q and out
  // [tokens, query_heads, head_dim], q scaled; query i sees keys 0 .. first + i. Blocks of a layer
  // come in order. RESOURCE_EXHAUSTED when the layer does not fit.
  Status Attend(uint32_t first, uint32_t tokens, const float* q, const LayerRows& rows, float* out);

 private:
  Status Reserve(uint32_t tokens);
  void QueueRows(uint32_t first, uint32_t tokens, const LayerRows& rows);
  void ListPages(uint32_t end);
  void ListTasks(uint32_t first, uint32_t tokens);

  gpu::Device& device_;
  const ModelShape shape_;
  const uint32_t pages_;  // of a head's K or V
  std::vector<PageView> views_;
  std::vector<gpu::AttendTask> tasks_;
  gpu::DeviceMemory rows_;   // [kv_heads][K, V][pages * 16] rows
  gpu::DeviceMemory lists_;  // views, then tasks
  gpu::DeviceMemory q_, states_, result_;
};

}  // namespace icecache
