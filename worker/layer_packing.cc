#include "worker/layer_packing.h"

#include <algorithm>
#include <memory>
#include <string>

#include "common/log.h"
#include "kernels/gpu/assigner_gpu.h"
#include "kernels/packing.h"

namespace icecache {
Result<std::vector<Packing>> ProposeLayouts(const LayerRows& rows,
                                            std::span<const float> query_energy,
                                            const LayerPackingOptions& options,
                                            ComputeThreads& threads) {
  const ModelShape& shape = rows.shape();
  const uint32_t sinks = std::min(options.sink_tokens, rows.tokens());
  const uint32_t window = std::min(options.window_tokens, rows.tokens() - sinks);
  const uint32_t indexed = rows.tokens() - sinks - window;
  if (indexed == 0) return std::vector<Packing>();
  std::vector<Packing> layouts(shape.kv_heads);
  std::vector<Status> statuses(shape.kv_heads);
  const auto propose = [&](uint32_t head, PointAssigner& assigner) {
    TokenRows index = rows.view(KvHeadId(static_cast<uint16_t>(head)));
    index.k += sinks * index.row_bytes();
    index.v += sinks * index.row_bytes();
    index.count = indexed;
    const auto energy = query_energy.empty()
                            ? query_energy
                            : query_energy.subspan(size_t{head} * shape.head_dim, shape.head_dim);
    const uint64_t flat_index = uint64_t{options.layer.value} * shape.kv_heads + head;
    Result<Packing> layout =
        packing::Propose(index, energy, SliceSeed(options.seed, flat_index), assigner);
    statuses[head] = layout.ok() ? CheckPacking(*layout, indexed) : layout.status();
    if (layout.ok()) layouts[head] = std::move(*layout);
  };
  const uint32_t together = options.device == nullptr ? threads.count() : 1;
  const auto on_device =
      options.device == nullptr ? nullptr : gpu::MakeGpuAssigner(*options.device);
  for (uint32_t first = 0; first < shape.kv_heads; first += together) {
    if (on_device != nullptr) {
      propose(first, *on_device);
    } else {
      threads.For(std::min(together, shape.kv_heads - first),
                  [&](uint32_t i, uint32_t) { propose(first + i, *MakeCpuAssigner()); });
    }
    if (options.pump) KV_RETURN_IF_ERROR(options.pump());
  }
  if (const Status status = FirstError(statuses); !status.ok()) {
    LogWarn("a layer is left to the server to build", {{"reason", status.ToString()}});
    return std::vector<Packing>();
  }
  return layouts;
}

}  // namespace icecache
