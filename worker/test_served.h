// For tests: shards behind the loopback transport, a client that is connected to all of them, and a
// context whose layers hold the rows of random sequences, prefilled through LayerUpload.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "worker/cache_client.h"
#include "worker/layer_upload.h"
#include "worker/prefill.h"
#include "common/test_loop.h"
#include "worker/test_rows.h"
#include "worker/test_shard.h"

namespace icecache::test {

class ServedDocument {
 public:
  // `tokens` of the document; the sequences hold `extra` more to decode with.
  ServedDocument(const ModelShape& s, uint32_t sinks, uint32_t window, uint32_t tokens,
                 uint32_t extra, uint16_t shard_count, uint64_t seed,
                 const LoopbackFaults& faults = {})
      : shape(s),
        network(MakeLoopbackNetwork(faults)),
        transport(MakeLoopbackTransport(loop.reactor, network)),
        window_state(s, sinks, window) {
    std::mt19937_64 rng(seed);
    std::vector<std::string> addresses;
    for (uint16_t i = 0; i < shard_count; ++i) {
      shards.push_back(
          std::make_unique<TestShard>(loop.reactor, network, shape, sinks, window, i, shard_count));
      addresses.push_back(shards.back()->address);
    }
    CacheClientOptions options;
    options.upload_bytes_in_flight_max = 4096;
    client = CacheClient::Connect(loop.reactor, *transport, addresses, options).value();
    grant.context.id = ContextId(5);
    grant.context.shape = shape;
    grant.context.tokens = tokens;
    grant.context.sink_tokens = sinks;
    grant.context.window_tokens = window;
    grant.context.tail_tokens = std::min(window, tokens - std::min(sinks, tokens));
    grant.context.segments.push_back({SegmentId(7)});
    grant.epoch = Epoch(9);
    grant.ticket.resize(16);
    handle = {grant.context.id, grant.epoch, shape};
    for (uint32_t l = 0; l < shape.layers; ++l) layers.emplace_back(shape, rng, tokens + extra);
    document_tokens = tokens;
  }

  Status Upload() {
    KV_RETURN_IF_ERROR(client->Attach(grant));
    LayerUpload upload(*client, handle);
    for (uint16_t l = 0; l < shape.layers; ++l) {
      auto rows = std::make_shared<LayerRows>(shape, TokenPos(0), document_tokens);
      std::vector<float> k = layers[l].k, v = layers[l].v;
      rows->RoundAndStore(0, document_tokens, k.data(), v.data());
      window_state.LoadDocument(LayerId(l), *rows);
      upload.Start(LayerId(l), std::move(rows), {});
      KV_RETURN_IF_ERROR(upload.WaitRows());
    }
    return upload.WaitAll();
  }

  // As a worker does: the model computes the rows and they go to the server. The last hidden state.
  Result<std::vector<float>> PrefillFrom(Model& model, std::span<const int32_t> document) {
    KV_RETURN_IF_ERROR(client->Attach(grant));
    LayerUpload upload(*client, handle);
    KV_ASSIGN_OR_RETURN(std::vector<float> hidden,
                        Prefill(model, document, {}, [&](FinishedLayer layer) -> Status {
                          window_state.LoadDocument(layer.layer, *layer.rows);
                          KV_RETURN_IF_ERROR(upload.WaitRows());
                          upload.Start(layer.layer, std::move(layer.rows),
                                       std::move(layer.query_energy));
                          return OkStatus();
                        }));
    KV_RETURN_IF_ERROR(upload.WaitAll());
    return hidden;
  }

  // The virtual time that `fn` takes.
  template <typename Fn>
  Duration Timed(const Fn& fn) {
    const TimePoint start = loop.clock.Now();
    fn();
    return loop.clock.Now() - start;
  }

  const ModelShape shape;
  TestLoop loop;
  std::shared_ptr<LoopbackNetwork> network;
  std::unique_ptr<Transport> transport;
  std::vector<std::unique_ptr<TestShard>> shards;
  std::unique_ptr<CacheClient> client;
  wire::Grant grant;
  ContextHandle handle;
  SinkWindow window_state;
  std::vector<Sequence> layers;
  uint32_t document_tokens = 0;
};

}  // namespace icecache::test
