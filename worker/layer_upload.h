// LayerUpload: streams the rows of a prefill to the cache server, layer by layer, in the
// background: it goes on whenever the reactor turns, with a bound on the bytes that are on their
// way. After a layer's rows follows its Build.
//
//   Start(layer 0) .. compute .. WaitRows, Start(layer 1) .. compute .. WaitAll
//
// The first error stops everything and is what the waits return. Owner's thread: the reactor's.
// Rows stay alive until they are sent: WaitRows before the next Start keeps at most two layers in
// memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "worker/cache_client.h"
#include "worker/layer_rows.h"

namespace icecache {

class LayerUpload {
 public:
  // The client outlives the upload.
  LayerUpload(CacheClient& client, const ContextHandle& context);
  ~LayerUpload();  // rows on their way may still arrive; their answers are ignored
  LayerUpload(const LayerUpload&) = delete;
  LayerUpload& operator=(const LayerUpload&) = delete;

  // Queues all rows of the layer and its Build; returns at once.
  // query_energy: [kv_heads, head_dim] or empty. layouts: proposed, one per kv head, or none.
  void Start(LayerId layer, std::shared_ptr<const LayerRows> rows, std::vector<float> query_energy,
             std::vector<Packing> layouts = {});

  Status WaitRows();  // until every row is taken by its shard
  Status WaitAll();   // and every layer is indexed
  Status error() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace icecache
