#include "worker/appender.h"

#include <algorithm>
#include <string>

#include "common/limits.h"

namespace icecache {

Appender::Appender(const ModelShape& shape) : layers_(shape.layers) {}

Status Appender::Push(LayerId layer, const LayerRows& token, TokenPos position) {
  Layer& l = layers_[layer.value];
  if (l.tokens.size() >= limits::kPendingTokensMax) {
    return Unavailable("layer " + std::to_string(layer.value) + ": " +
                       std::to_string(l.tokens.size()) +
                       " tokens wait for the cache server to take them; it answers too slowly "
                       "(see its load) or not at all");
  }
  if (l.tokens.empty()) l.first = position;
  KV_CHECK(l.first.value + l.tokens.size() == position.value);
  l.tokens.push_back(token);
  return OkStatus();
}

void Appender::Confirm(LayerId layer, TokenPos next) {
  Layer& l = layers_[layer.value];
  if (next <= l.first) return;
  const size_t count = std::min<size_t>(next.value - l.first.value, l.tokens.size());
  l.tokens.erase(l.tokens.begin(), l.tokens.begin() + static_cast<ptrdiff_t>(count));
  l.first = TokenPos(l.first.value + static_cast<uint32_t>(count));
}

void Appender::Clear() {
  for (Layer& layer : layers_) layer.tokens.clear();
}

}  // namespace icecache
