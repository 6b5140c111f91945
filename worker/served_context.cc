#include "worker/served_context.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "common/limits.h"
#include "worker/layer_packing.h"
#include "worker/layer_upload.h"

namespace icecache {
namespace {

// The rest of a prompt goes token by token through sparse attention. Of more than a block it may be
// this part of what was found.
constexpr uint32_t kRestShare = 8;

Status CheckSameModel(const std::string& parent, const wire::ContextInfo& info,
                      const Model& model) {
  if (info.shape == model.shape() && info.model == model.identity()) return OkStatus();
  return InvalidArgument(
      "context '" + parent + "' was made by " + info.model + " (" + info.shape.ToString() +
      "), this worker runs " + model.identity() + " (" + model.shape().ToString() +
      "); use the same --model and --kv-dtype, or prefill a context of your own");
}

}  // namespace

Result<ServedContext> PrefillToServer(ServerLink& link, Model& model,
                                      const PrefillRequest& request) {
  const ModelShape& shape = model.shape();
  wire::Create create;
  create.name = request.name;
  create.shape = shape;
  create.model = model.identity();
  create.sink_tokens = request.sink_tokens;
  create.window_tokens = request.window_tokens;
  create.policy = request.policy;
  create.seed = request.seed;
  ServedContext context;
  KV_ASSIGN_OR_RETURN(context.grant, link.control().Create(create));
  context.handle = {context.grant.context.id, context.grant.epoch, shape};
  KV_RETURN_IF_ERROR(link.cache().Attach(context.grant));
  context.window = SinkWindow(shape, request.sink_tokens, request.window_tokens);
  context.tokens = static_cast<uint32_t>(request.tokens.size());

  LayerUpload upload(link.cache(), context.handle);
  std::optional<ComputeThreads> packers;
  if (request.build_here) packers.emplace(request.prefill.threads);
  LayerPackingOptions packing{LayerId(0),   request.sink_tokens,    request.window_tokens,
                              request.seed, request.prefill.device, request.prefill.pump};
  KV_ASSIGN_OR_RETURN(
      context.last_hidden,
      Prefill(model, request.tokens, request.prefill, [&](FinishedLayer layer) -> Status {
        context.window.LoadDocument(layer.layer, *layer.rows);
        if (request.on_layer) request.on_layer(layer);
        // At most this layer and the one on its way are in memory.
        KV_RETURN_IF_ERROR(upload.WaitRows());
        std::vector<Packing> layouts;
        if (packers) {
          packing.layer = layer.layer;
          KV_ASSIGN_OR_RETURN(
              layouts, ProposeLayouts(*layer.rows, layer.query_energy, packing, *packers));
        }
        upload.Start(layer.layer, std::move(layer.rows), std::move(layer.query_energy),
                     std::move(layouts));
        return OkStatus();
      }));
  KV_RETURN_IF_ERROR(upload.WaitAll());
  return context;
}

Result<ServedContext> ForkFromServer(ServerLink& link, const Model& model, const wire::Fork& fork,
                                     const std::optional<SinkWindow>& known) {
  ServedContext context;
  KV_ASSIGN_OR_RETURN(context.grant, link.control().Fork(fork));
  const wire::ContextInfo& info = context.grant.context;
  if (Status same = CheckSameModel(fork.parent, info, model); !same.ok()) {
    (void)link.control().Release(info.id);
    return same;
  }
  context.handle = {info.id, context.grant.epoch, info.shape};
  context.tokens = info.tokens;
  KV_RETURN_IF_ERROR(link.cache().Attach(context.grant));
  if (known) {
    context.window = *known;
    return context;
  }
  context.window = SinkWindow(info.shape, info.sink_tokens, info.window_tokens);
  KV_RETURN_IF_ERROR(link.cache().FetchWindow(context.handle, info, &context.window));
  return context;
}

PrefixIdentity PrefixIdentityOf(const Model& model, const PrefillRequest& request) {
  return {.model = model.identity(),
          .shape = model.shape(),
          .sink_tokens = request.sink_tokens,
          .window_tokens = request.window_tokens,
          .policy = request.policy,
          .seed = request.seed};
}

Result<std::optional<ServedContext>> ForkMatch(ServerLink& link, const Model& model,
                                               const PrefillRequest& request, uint32_t tokens_max,
                                               bool shared) {
  const PrefixIdentity identity = PrefixIdentityOf(model, request);
  KV_ASSIGN_OR_RETURN(
      const std::vector<wire::PrefixCandidate> found,
      link.control().MatchPrefix({PrefixKeys(identity, request.tokens, false), tokens_max, shared}));
  for (const wire::PrefixCandidate& candidate : found) {
    const uint32_t tokens = candidate.tokens;
    if (tokens > tokens_max || tokens < request.sink_tokens) continue;
    const auto rest = static_cast<uint32_t>(request.tokens.size()) - tokens;
    if (rest > std::max(limits::kPrefixBlockTokens, tokens / kRestShare)) break;
    if (PrefixKeyOf(identity, request.tokens.first(tokens)) != candidate.key) continue;
    Result<ServedContext> forked =
        ForkFromServer(link, model,
                       {.parent = candidate.name,
                        .name = request.name,
                        .tokens = tokens,
                        .owner = candidate.owner,
                        .key = candidate.key},
                       std::nullopt);
    // Dropped since, no longer what it was, or not what its publisher said: the next one, or a
    // prefill.
    const StatusCode code = forked.status().code();
    if (code == StatusCode::kNotFound || code == StatusCode::kFailedPrecondition ||
        code == StatusCode::kInvalidArgument) {
      continue;
    }
    KV_RETURN_IF_ERROR(forked.status());
    return std::optional(std::move(forked).value());
  }
  return std::optional<ServedContext>();
}

std::string FreshContextName(const std::string& prefix) {
  static std::atomic<uint64_t> next{0};
  return prefix + "-" + std::to_string(::getpid()) + "-" + std::to_string(next++);
}

}  // namespace icecache
