#include "worker/sink_window.h"

#include <algorithm>
#include <cstring>

#include "common/status.h"

namespace icecache {
namespace {

// Rows [from, from + count) of every head of `source` to rows [to, ...) of `target`.
void CopyRows(const LayerRows& source, uint32_t from, uint32_t count, uint32_t to,
              LayerRows* target) {
  if (count == 0) return;
  KV_CHECK(from + count <= source.tokens() && to + count <= target->tokens());
  const size_t row_bytes = source.shape().row_bytes();
  const size_t bytes = count * row_bytes;
  for (uint16_t h = 0; h < source.shape().kv_heads; ++h) {
    const KvHeadId head(h);
    std::memcpy(target->k(head).data() + to * row_bytes, source.k(head).data() + from * row_bytes,
                bytes);
    std::memcpy(target->v(head).data() + to * row_bytes, source.v(head).data() + from * row_bytes,
                bytes);
  }
}

}  // namespace

SinkWindow::SinkWindow(const ModelShape& shape, uint32_t sink_tokens, uint32_t window_tokens)
    : shape_(shape), sink_tokens_(sink_tokens), window_tokens_(window_tokens) {
  layers_.resize(shape.layers);
  for (Layer& layer : layers_) {
    layer.sinks = LayerRows(shape, TokenPos(0), sink_tokens);
    layer.window = LayerRows(shape, TokenPos(0), window_tokens);
  }
}

void SinkWindow::LoadTail(Layer* layer, const LayerRows& rows, uint32_t begin) {
  layer->window_count = rows.tokens() - begin;
  KV_CHECK(layer->window_count <= window_tokens_);
  layer->oldest = 0;
  layer->window_first = TokenPos(rows.first().value + begin);
  CopyRows(rows, begin, layer->window_count, 0, &layer->window);
}

void SinkWindow::LoadDocument(LayerId layer, const LayerRows& rows) {
  KV_CHECK(rows.first().value == 0);
  Layer& l = layers_[layer.value];
  l.sink_count = std::min(sink_tokens_, rows.tokens());
  CopyRows(rows, 0, l.sink_count, 0, &l.sinks);
  LoadTail(&l, rows, rows.tokens() - std::min(window_tokens_, rows.tokens() - l.sink_count));
}

void SinkWindow::LoadParts(LayerId layer, const LayerRows& sinks, const LayerRows& tail) {
  KV_CHECK(sinks.tokens() <= sink_tokens_);
  Layer& l = layers_[layer.value];
  l.sink_count = sinks.tokens();
  CopyRows(sinks, 0, l.sink_count, 0, &l.sinks);
  LoadTail(&l, tail, 0);
}

std::optional<TokenPos> SinkWindow::Append(LayerId layer, const LayerRows& token, LayerRows* left) {
  Layer& l = layers_[layer.value];
  KV_CHECK(token.tokens() == 1 && token.first() == next(layer));
  if (window_tokens_ == 0) {
    CopyRows(token, 0, 1, 0, left);
    l.window_first = TokenPos(token.first().value + 1);
    return token.first();
  }
  if (l.window_count < window_tokens_) {
    CopyRows(token, 0, 1, l.window_count++, &l.window);
    return std::nullopt;
  }
  CopyRows(l.window, l.oldest, 1, 0, left);
  CopyRows(token, 0, 1, l.oldest, &l.window);
  l.oldest = (l.oldest + 1) % window_tokens_;
  const TokenPos position = l.window_first;
  l.window_first = TokenPos(position.value + 1);
  return position;
}

std::optional<TokenPos> SinkWindow::PeekLeaving(LayerId layer, LayerRows* left) const {
  const Layer& l = layers_[layer.value];
  if (window_tokens_ == 0 || l.window_count < window_tokens_) return std::nullopt;
  CopyRows(l.window, l.oldest, 1, 0, left);
  return l.window_first;
}

TokenRows SinkWindow::sinks(LayerId layer, KvHeadId head) const {
  const Layer& l = layers_[layer.value];
  TokenRows rows = l.sinks.view(head);
  rows.count = l.sink_count;
  return rows;
}

TokenRows SinkWindow::window(LayerId layer, KvHeadId head) const {
  const Layer& l = layers_[layer.value];
  TokenRows rows = l.window.view(head);
  rows.count = l.window_count;
  return rows;
}

TokenPos SinkWindow::next(LayerId layer) const {
  const Layer& l = layers_[layer.value];
  return TokenPos(l.window_first.value + l.window_count);
}

uint64_t SinkWindow::bytes() const {
  uint64_t bytes = 0;
  for (const Layer& layer : layers_) bytes += layer.sinks.bytes() + layer.window.bytes();
  return bytes;
}

}  // namespace icecache
