// What `icecache-bench decode` decodes: a server process that holds a context with the shape of a
// known model, filled with calibrated synthetic K and V (trace.h), and the queries, keys and values
// of the tokens to come. The same K and V stand in this process too, for full attention.
//
// Layers share their text, and heads of one index look for much the same from layer to layer, as
// heads of real models do (notes in docs/decode.md). No weights are involved.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/process.h"
#include "worker/local_kv.h"
#include "worker/server_link.h"
#include "worker/sink_window.h"

namespace icecache {

// Shapes by the names of models; `layers` is the model's own. INVALID_ARGUMENT lists the names.
Result<ModelShape> ShapeByName(const std::string& name);

struct DecodeSceneOptions {
  ModelShape shape;  // layers: as many as are to be run
  uint32_t context_tokens = 32768;
  uint32_t steps = 32;  // tokens to decode
  uint32_t sink_tokens = 16;
  uint32_t window_tokens = 16;
  uint32_t server_threads = 2;
  std::string policy = "cluster_tree";
  uint64_t seed = 1;
};

class DecodeScene {
 public:
  // Starts the server, uploads and indexes every layer, seals and publishes. Minutes for large
  // contexts; says on stderr how far it is. Memory: the K and V once here and once in the server,
  // and one layer more in both while it is built.
  static Result<std::unique_ptr<DecodeScene>> Make(const DecodeSceneOptions& options);

  // A connection of its own and a fork of the context. transport: "shm" or "tcp".
  struct Session {
    std::unique_ptr<ServerLink> link;
    wire::Grant grant;
    ContextHandle handle;
  };
  Result<Session> Join(const std::string& transport, ReplyMode mode,
                       const DevicePages& device = {});

  const DecodeSceneOptions& options() const { return options_; }
  const SinkWindow& window() const { return window_; }  // right after the document
  LocalKv& local() { return *local_; }
  // Of decode step `step` in a layer: q[query_heads, head_dim] scaled, k and v[kv_heads, head_dim].
  const float* q(LayerId layer, uint32_t step) const;
  const float* k(LayerId layer, uint32_t step) const;
  const float* v(LayerId layer, uint32_t step) const;

  // How much layers look at the same tokens: the attention mass of a layer on the `count` best
  // tokens of the layer before, relative to that on its own best, mean over heads. Reads all keys;
  // 0 with one layer.
  double LayerOverlap(uint32_t count) const;
  uint64_t server_bytes() const;  // of memory that the server uses for the context

 private:
  explicit DecodeScene(const DecodeSceneOptions& options);
  Status Start();
  Status AddLayer(LayerId layer, ServerLink& link, const ContextHandle& context);
  Status DrawHead(LayerId layer, KvHeadId head, LayerRows* rows, float* energy);
  // Of the document's tokens, summed over the group.
  std::vector<float> TokenMass(LayerId layer, KvHeadId head, uint32_t step) const;

  const DecodeSceneOptions options_;
  std::unique_ptr<test::TestServer> server_;
  SinkWindow window_;
  std::unique_ptr<LocalKv> local_;
  std::vector<float> q_, k_, v_;  // [layers, steps, heads, head_dim]
  uint32_t sessions_ = 0;
};

}  // namespace icecache
