// A document that a model has read once: K and V of every token, and the queries of its last ones.
// All policies, budgets and questions start from here, so a table costs one prefill per document.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "worker/local_kv.h"
#include "worker/model/model.h"

namespace icecache {

struct ReadDocument {
  ModelShape shape;
  uint32_t tokens = 0;
  uint32_t query_count = 0;
  std::unique_ptr<LocalKv> kv;  // grows while questions are asked; Truncate(tokens) takes it back
  std::vector<std::vector<float>> queries;  // [slices][query_count, group, head_dim], oldest first
  std::vector<std::vector<float>> energy;   // [slices][head_dim]: their mean squares

  size_t slice(LayerId layer, KvHeadId head) const {
    return size_t{layer.value} * shape.kv_heads + head.value;
  }
};

// Prefill, or what an earlier run left in `cache` (a folder of trace files, worker/trace_file.h,
// named by a hash of model and tokens; empty: none). progress(done, total): in token-layers.
Result<ReadDocument> ReadOnce(Model& model, std::span<const int32_t> tokens, uint32_t threads,
                              const std::string& cache,
                              const std::function<void(uint64_t, uint64_t)>& progress);

}  // namespace icecache
