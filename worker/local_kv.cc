#include "worker/local_kv.h"

#include "common/status.h"

namespace icecache {

LocalKv::LocalKv(const ModelShape& shape) : shape_(shape), layers_(shape.layers) {
  for (Layer& layer : layers_) {
    layer.k.resize(shape.kv_heads);
    layer.v.resize(shape.kv_heads);
  }
}

void LocalKv::Append(LayerId layer, const LayerRows& rows) {
  Layer& l = layers_[layer.value];
  KV_CHECK(rows.first().value == l.tokens);
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    const auto k = rows.k(KvHeadId(h));
    const auto v = rows.v(KvHeadId(h));
    l.k[h].insert(l.k[h].end(), k.begin(), k.end());
    l.v[h].insert(l.v[h].end(), v.begin(), v.end());
  }
  l.tokens += rows.tokens();
}

void LocalKv::Truncate(uint32_t tokens) {
  for (Layer& layer : layers_) {
    if (layer.tokens <= tokens) continue;
    layer.tokens = tokens;
    for (auto& rows : layer.k) rows.resize(tokens * shape_.row_bytes());
    for (auto& rows : layer.v) rows.resize(tokens * shape_.row_bytes());
  }
}

TokenRows LocalKv::rows(LayerId layer, KvHeadId head) const {
  const Layer& l = layers_[layer.value];
  return {shape_.dtype, shape_.head_dim, l.tokens, l.k[head.value].data(), l.v[head.value].data()};
}

uint64_t LocalKv::bytes() const {
  uint64_t bytes = 0;
  for (const Layer& layer : layers_) {
    bytes += uint64_t{layer.tokens} * shape_.kv_heads * 2 * shape_.row_bytes();
  }
  return bytes;
}

}  // namespace icecache
