// Prefill: a whole prompt through the model, all tokens of one layer before the next, so that only
// one layer's K and V need to be in memory. Each finished layer is handed to the caller, who
// streams it to the cache server, keeps its sinks and window, or keeps all of it.
//
// Attention is dense and causal over K and V as they will be stored (rounded to the shape's dtype),
// so that what decodes later continues exactly what prefill computed. Thread: the decode thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "common/clock.h"
#include "worker/layer_rows.h"
#include "worker/model/model.h"

namespace icecache {

namespace gpu {
class Device;
}

struct PrefillOptions {
  uint32_t threads = 0;           // of attention; 0: one per core
  gpu::Device* device = nullptr;  // attends there instead
  uint32_t query_tokens = 0;      // queries of so many last tokens are handed over, too
  // Called often (many times a second on small models): turns the reactor, says whether to go on.
  std::function<Status()> pump;
  std::function<void(uint64_t done, uint64_t total)> progress;  // in token-layers
};

struct FinishedLayer {
  LayerId layer;
  std::shared_ptr<LayerRows> rows;  // all tokens, from position 0
  // Mean square of the query elements of the last tokens, [kv_heads, head_dim]: which dimensions
  // queries use.
  std::vector<float> query_energy;
  // Of the last query_tokens tokens (or all), scaled: [kv_heads, tokens, group, head_dim].
  std::vector<float> queries;
};

// The final hidden state of the last token (for Model::Logits). INVALID_ARGUMENT for no tokens or
// too many; else what the model, `on_layer` or `pump` answered.
Result<std::vector<float>> Prefill(Model& model, std::span<const int32_t> tokens,
                                   const PrefillOptions& options,
                                   const std::function<Status(FinishedLayer)>& on_layer);

}  // namespace icecache
