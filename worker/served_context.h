// ServedContext: a context of the cache server as one worker uses it: its grant, and the sinks and
// window with which decoding starts. Either prefilled by this worker or forked from a sealed
// context without prefilling.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "worker/cache_client.h"
#include "worker/model/model.h"
#include "worker/prefill.h"
#include "worker/server_link.h"
#include "worker/sink_window.h"

namespace icecache {

struct ServedContext {
  wire::Grant grant;
  ContextHandle handle;
  SinkWindow window;               // right after the last token
  uint32_t tokens = 0;             // position of the token to come
  std::vector<float> last_hidden;  // of the last token; empty for a fork
};

struct PrefillRequest {
  std::string name;  // of the context
  std::span<const int32_t> tokens;
  uint32_t sink_tokens = 16;
  uint32_t window_tokens = 16;
  std::string policy = "cluster_tree";
  uint64_t seed = 1;
  bool build_here = false;  // cluster layers here and propose the layouts; cluster_tree only
  PrefillOptions prefill;
  std::function<void(const FinishedLayer&)> on_layer;  // looks on, optional
};

// Creates the context, prefills and uploads; returns when the server has indexed every layer.
Result<ServedContext> PrefillToServer(ServerLink& link, Model& model,
                                      const PrefillRequest& request);

// Forks and attaches. `known`: the parent's sinks and tail, when this
// worker has them already; else they are fetched. INVALID_ARGUMENT when the context was made by
// another model.
Result<ServedContext> ForkFromServer(ServerLink& link, const Model& model, const wire::Fork& fork,
                                     const std::optional<SinkWindow>& known);
inline Result<ServedContext> ForkFromServer(ServerLink& link, const Model& model,
                                            const std::string& parent, const std::string& name,
                                            const std::optional<SinkWindow>& known) {
  return ForkFromServer(link, model, {.parent = parent, .name = name}, known);
}

// What decides K, V and their layout, for the keys of a prompt (common/prefix_key.h).
PrefixIdentity PrefixIdentityOf(const Model& model, const PrefillRequest& request);

// Forks a published context that begins with the request's tokens, as far as that goes; the caller
// runs the rest. nullopt: none, or one that leaves so much to run that a prefill is quicker.
// tokens_max: how many it may hold. shared: of other tenants, too.
Result<std::optional<ServedContext>> ForkMatch(ServerLink& link, const Model& model,
                                               const PrefillRequest& request, uint32_t tokens_max,
                                               bool shared);

// "prefix-<pid>-<n>": a name that no other worker on this machine takes.
std::string FreshContextName(const std::string& prefix);

}  // namespace icecache
