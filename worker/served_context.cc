#include "worker/served_context.h"

#include <unistd.h>

#include <atomic>
#include <utility>

#include "worker/layer_upload.h"

namespace icecache {
namespace {

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
  KV_ASSIGN_OR_RETURN(
      context.last_hidden,
      Prefill(model, request.tokens, request.prefill, [&](FinishedLayer layer) -> Status {
        context.window.LoadDocument(layer.layer, *layer.rows);
        if (request.on_layer) request.on_layer(layer);
        // At most this layer and the one on its way are in memory.
        KV_RETURN_IF_ERROR(upload.WaitRows());
        upload.Start(layer.layer, std::move(layer.rows), std::move(layer.query_energy));
        return OkStatus();
      }));
  KV_RETURN_IF_ERROR(upload.WaitAll());
  return context;
}

Result<ServedContext> ForkFromServer(ServerLink& link, const Model& model,
                                     const std::string& parent, const std::string& name,
                                     const std::optional<SinkWindow>& known) {
  ServedContext context;
  KV_ASSIGN_OR_RETURN(context.grant, link.control().Fork(parent, name));
  const wire::ContextInfo& info = context.grant.context;
  KV_RETURN_IF_ERROR(CheckSameModel(parent, info, model));
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

std::string FreshContextName(const std::string& prefix) {
  static std::atomic<uint64_t> next{0};
  return prefix + "-" + std::to_string(::getpid()) + "-" + std::to_string(next++);
}

}  // namespace icecache
