// Rows that are in no index: sinks and tail of a context, for a worker that goes on from it.
#include <cstring>
#include <string>
#include <utility>

#include "common/checksum.h"
#include "worker/cache_client.h"

namespace icecache {

// Rows of one part, all layers, as they come in. Shared with callbacks that may outlive an
// interrupted wait.
struct CacheClient::FetchState {
  ModelShape shape;
  wire::RowsPart part;
  uint32_t count;
  TokenPos first;
  std::vector<LayerRows> rows;  // by layer
  uint32_t open = 0;
  Status error;

  Status Take(LayerId layer, const std::vector<KvHeadId>& heads, const InMessage& message) {
    KV_ASSIGN_OR_RETURN(const wire::FetchRowsReply reply,
                        wire::DecodeFetchRowsReply(message, shape, heads.size()));
    const std::string where = std::string(part == wire::RowsPart::kSinks ? "sinks" : "tail") +
                              " of layer " + std::to_string(layer.value);
    if (reply.count != count || reply.first_position != first.value) {
      return DataLoss(where + ": " + std::to_string(reply.count) + " rows from position " +
                      std::to_string(reply.first_position) + ", expected " + std::to_string(count) +
                      " from " + std::to_string(first.value));
    }
    if (Checksum64(reply.body) != reply.checksum) return DataLoss(where + ": checksum mismatch");
    const size_t block = count * shape.row_bytes();
    for (size_t i = 0; i < heads.size(); ++i) {
      std::memcpy(rows[layer.value].k(heads[i]).data(), reply.body.data() + 2 * i * block, block);
      std::memcpy(rows[layer.value].v(heads[i]).data(), reply.body.data() + (2 * i + 1) * block,
                  block);
    }
    return OkStatus();
  }
};

Result<std::vector<LayerRows>> CacheClient::FetchPart(const ContextHandle& context,
                                                      wire::RowsPart part, uint32_t count,
                                                      TokenPos first) {
  const auto state = std::make_shared<FetchState>();
  const ModelShape& shape = context.shape;
  *state = {shape, part, count, first, {}, 0, {}};
  state->rows.assign(shape.layers, LayerRows(shape, first, count));
  for (uint16_t l = 0; l < shape.layers && count > 0; ++l) {
    for (uint16_t i = 0; i < shard_count(); ++i) {
      const std::vector<KvHeadId> heads = HeadsOf(LayerId(l), ShardId(i), shape);
      if (heads.empty()) continue;
      wire::FetchRowsRequest request;
      request.slices = {context.id, context.epoch, LayerId(l), heads};
      request.part = part;
      OutMessage message;
      wire::Encode(request, &message);
      ++state->open;
      Call(ShardId(i), std::move(message), options_.request_deadline,
           [state, l, heads](const Result<InMessage>& reply) {
             --state->open;
             if (!state->error.ok()) return;
             state->error = reply.ok() ? state->Take(LayerId(l), heads, *reply) : reply.status();
           });
    }
  }
  KV_RETURN_IF_ERROR(Wait([&] { return state->open == 0; }, options_.request_deadline + kGrace));
  if (!state->error.ok()) return state->error;
  return std::move(state->rows);
}

Status CacheClient::FetchWindow(const ContextHandle& context, const wire::ContextInfo& info,
                                SinkWindow* window) {
  const uint32_t tail = std::min(info.tail_tokens, info.tokens);
  const uint32_t sinks = std::min(info.sink_tokens, info.tokens - tail);
  KV_ASSIGN_OR_RETURN(const std::vector<LayerRows> sink_rows,
                      FetchPart(context, wire::RowsPart::kSinks, sinks, TokenPos(0)));
  KV_ASSIGN_OR_RETURN(
      const std::vector<LayerRows> tail_rows,
      FetchPart(context, wire::RowsPart::kTail, tail, TokenPos(info.tokens - tail)));
  for (uint16_t l = 0; l < context.shape.layers; ++l) {
    window->LoadParts(LayerId(l), sink_rows[l], tail_rows[l]);
  }
  return OkStatus();
}

}  // namespace icecache
