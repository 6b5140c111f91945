// Appender: tokens that left the worker's window and that the server has not confirmed yet. They
// ride on the next Select of their layer, and again until every shard that owns a head of the layer
// has answered (the server ignores what it has). One queue per layer; owner's thread: the decode
// thread.
#pragma once

#include <cstdint>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/status.h"
#include "worker/layer_rows.h"

namespace icecache {

class Appender {
 public:
  Appender() = default;
  explicit Appender(const ModelShape& shape);

  // UNAVAILABLE when kPendingTokensMax tokens wait: the server has not answered for that long.
  // REQUIRES: positions of a layer ascend one by one.
  Status Push(LayerId layer, const LayerRows& token, TokenPos position);
  // Drops tokens below `next` (what a layer's every shard has confirmed).
  void Confirm(LayerId layer, TokenPos next);
  void Clear();

  // Tokens that wait, in order; the first is at first(). Each row: [kv_heads] x [K row, V row].
  TokenPos first(LayerId layer) const { return layers_[layer.value].first; }
  const std::vector<LayerRows>& tokens(LayerId layer) const { return layers_[layer.value].tokens; }

 private:
  struct Layer {
    TokenPos first;
    std::vector<LayerRows> tokens;  // one token each; nearly always 0 or 1 of them
  };
  std::vector<Layer> layers_;
};

}  // namespace icecache
