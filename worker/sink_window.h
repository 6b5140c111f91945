// SinkWindow: the tokens that a worker always attends to. Per layer and kv head, the sinks (first
// tokens of the context, fixed once loaded) and a ring of the most recent tokens, both in the
// stored dtype.
//
//   1. construct      empty
//   2. Load per layer the sinks and the tail of the document become sinks and window
//   3. Append         a new token enters the window; when that is full, the oldest leaves and is
//   handed out
//
// A value: a copy is a snapshot, and assigning it back is a roll-back (a few rows per head). The
// order of rows inside the ring is not that of their positions; attention does not care, RoPE is in
// the keys. Owner's thread: the decode thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "kernels/paged_kv.h"
#include "worker/layer_rows.h"

namespace icecache {

class SinkWindow {
 public:
  SinkWindow() = default;
  SinkWindow(const ModelShape& shape, uint32_t sink_tokens, uint32_t window_tokens);

  // The sinks and the last rows of a whole document's layer. REQUIRES: rows.first() == 0.
  void LoadDocument(LayerId layer, const LayerRows& rows);
  // The same from what a server keeps. REQUIRES: at most sink_tokens and window_tokens rows.
  void LoadParts(LayerId layer, const LayerRows& sinks, const LayerRows& tail);

  // The rows of one token, [kv_heads] x [K row, V row]. `left` (one token of the same form)
  // receives the token that the new one pushed out; its position is the answer, none while the
  // window fills up. With a window of no tokens it is the new token itself. REQUIRES: position is
  // the one after the last of this layer.
  std::optional<TokenPos> Append(LayerId layer, const LayerRows& token, LayerRows* left);

  // The token that the next Append will push out, like `left` of Append; none while there is room,
  // and with a window of no tokens.
  std::optional<TokenPos> PeekLeaving(LayerId layer, LayerRows* left) const;

  TokenRows sinks(LayerId layer, KvHeadId head) const;
  TokenRows window(LayerId layer, KvHeadId head) const;
  TokenPos window_first(LayerId layer) const { return layers_[layer.value].window_first; }
  TokenPos next(LayerId layer) const;  // position of the token to come
  uint32_t sink_count(LayerId layer) const { return layers_[layer.value].sink_count; }
  uint32_t window_count(LayerId layer) const { return layers_[layer.value].window_count; }
  uint64_t bytes() const;

 private:
  struct Layer {
    LayerRows sinks;   // capacity rows; sink_count are valid
    LayerRows window;  // ring
    uint32_t sink_count = 0;
    uint32_t window_count = 0;
    uint32_t oldest = 0;  // row of the ring that leaves next
    TokenPos window_first;
  };
  void LoadTail(Layer* layer, const LayerRows& rows, uint32_t begin);

  ModelShape shape_;
  uint32_t sink_tokens_ = 0;
  uint32_t window_tokens_ = 0;
  std::vector<Layer> layers_;
};

}  // namespace icecache
