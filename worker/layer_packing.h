// The layout of a prefilled layer, computed where the layer is: a worker that has its keys and
// values clusters them itself and proposes the result with its Build, so that the server only files
// the pages (--build-on worker, docs/adr/0017).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/page_layout.h"
#include "worker/layer_rows.h"
#include "worker/model/compute_threads.h"

namespace icecache {

namespace gpu {
class Device;
}

struct LayerPackingOptions {
  LayerId layer;
  uint32_t sink_tokens = 0;       // rows at the beginning that are not indexed
  uint32_t window_tokens = 0;     // and at the end
  uint64_t seed = 1;              // of the context
  gpu::Device* device = nullptr;  // assigns keys to centres; else the threads do
  std::function<Status()> pump;   // between slices; empty: nothing to turn
};

// One per kv head, over the rows that the server will index; none when there are no rows to index,
// when one of them would be refused there, or when the device fails, with a warning: the server
// builds then. query_energy: [kv_heads, head_dim] or empty. A few us per token and head, shared out
// to the threads. An error is the pump's.
Result<std::vector<Packing>> ProposeLayouts(const LayerRows& rows,
                                            std::span<const float> query_energy,
                                            const LayerPackingOptions& options,
                                            ComputeThreads& threads);

}  // namespace icecache
