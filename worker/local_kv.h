// LocalKv: K and V of all tokens of a sequence in the worker's memory, per layer and kv head, in
// the stored dtype. What a worker needs without a cache server; full KV and the exact top-k oracle
// attend over it. Owner's thread: the decode thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "kernels/paged_kv.h"
#include "worker/layer_rows.h"

namespace icecache {

class LocalKv {
 public:
  explicit LocalKv(const ModelShape& shape);

  // Adds rows of consecutive tokens. REQUIRES: rows.first() is the layer's token count.
  void Append(LayerId layer, const LayerRows& rows);
  // Forgets positions >= tokens in all layers.
  void Truncate(uint32_t tokens);

  TokenRows rows(LayerId layer, KvHeadId head) const;
  uint32_t tokens(LayerId layer) const { return layers_[layer.value].tokens; }
  uint64_t bytes() const;  // of the rows that are held

 private:
  struct Layer {
    uint32_t tokens = 0;
    std::vector<std::vector<std::byte>> k, v;  // [kv_heads][tokens * row_bytes]
  };

  const ModelShape shape_;
  std::vector<Layer> layers_;
};

}  // namespace icecache
