#include "worker/attention_icecache.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "worker/prefetch.h"
#include "worker/token_loop.h"

namespace icecache {

uint32_t IceCacheOptions::max_pages() const {
  return std::min(limits::kPagesPerSelectMax, budget.chosen() / limits::kPageTokens);
}

uint32_t IceCacheOptions::max_grown_pages() const {
  const uint32_t growth = min_mass > 0 ? std::max(1u, budget_growth) : 1;
  return std::min(limits::kPagesPerSelectMax, max_pages() * growth);
}

AttentionIceCache::AttentionIceCache(const ModelShape& shape, CacheClient& client,
                                     AttentionBackend& backend, const IceCacheOptions& options)
    : shape_(shape),
      client_(client),
      backend_(backend),
      options_(options),
      arena_(shape.page_bytes(), options.frames, options.intake),
      appender_(shape),
      token_(shape, TokenPos(0), 1),
      left_(shape, TokenPos(0), 1) {
  // What grown heads take beyond their budget need not stay.
  const uint32_t capacity = std::max(options.max_pages() * std::max(1u, options.resident_multiple),
                                     options.max_grown_pages());
  if (capacity > 0) {
    caches_.reserve(size_t{shape.layers} * shape.kv_heads);
    for (uint32_t i = 0; i < shape.layers * shape.kv_heads; ++i) {
      caches_.emplace_back(shape, capacity, arena_, options.sharing, i);
    }
  }
  for (uint16_t h = 0; h < shape.kv_heads; ++h) all_heads_.emplace_back(h);
  layers_.reserve(shape.layers);
  for (uint32_t l = 0; l < shape.layers; ++l) {
    layers_.emplace_back(
        shape,
        caches_.empty() ? std::span<PageCache>()
                        : std::span(caches_).subspan(size_t{l} * shape.kv_heads, shape.kv_heads),
        options.intake, &stats_);
  }
}

// Answers to questions that were sent ahead and will not be used.
void AttentionIceCache::Abandon() {
  for (Layer& layer : layers_) {
    if (layer.ahead != nullptr) client_.AbandonSelect(layer.ahead);
    layer.ahead = nullptr;
  }
  if (asked_ != nullptr) client_.AbandonSelect(std::exchange(asked_, nullptr));
}

void AttentionIceCache::Begin(const ContextHandle& context, const SinkWindow& window,
                              std::span<const wire::SegmentInfo> segments) {
  Abandon();
  context_ = context;
  window_ = window;
  appender_.Clear();
  for (Layer& layer : layers_) layer.confirmed = TokenPos(0);
  std::vector<SegmentId> ids;
  for (const wire::SegmentInfo& segment : segments) ids.push_back(segment.id);
  for (PageCache& cache : caches_) cache.RetainSegments(ids);
}

Status AttentionIceCache::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                                 const float* k, const float* v, float* out) {
  return ForEachToken(shape_, first, tokens, q, k, v, out,
                      [&](const TokenCall& call) { return AttendToken(layer, call); });
}

Status AttentionIceCache::AttendToken(LayerId layer, const TokenCall& call) {
  KV_RETURN_IF_ERROR(Enter(layer, call));
  const auto start = [&] {
    const AttentionTimer timer(&stats_.attention);
    return backend_.Start(items_);
  };
  items_.clear();
  AddLocal(layer, call, &items_);
  Status status = start();
  if (status.ok()) status = Collect(layer);
  if (status.ok()) {
    items_.clear();
    AddSelected(layer, call, &items_);
    status = start();
  }
  {
    const AttentionTimer timer(&stats_.attention);
    const AttentionResult result{states_.ref(), call.out};
    const Status finished =
        backend_.FinishTo({&result, 1});  // after an error, too: it ends the step
    if (status.ok()) status = finished;
  }
  KV_RETURN_IF_ERROR(status);
  Leave(layer, call);
  return OkStatus();
}

Status AttentionIceCache::Enter(LayerId layer, const TokenCall& call) {
  if (asked_ != nullptr) client_.AbandonSelect(std::exchange(asked_, nullptr));
  token_.StoreToken(call.position, call.k, call.v);
  if (const auto left = window_.Append(layer, token_, &left_)) {
    KV_RETURN_IF_ERROR(appender_.Push(layer, left_, *left));
  }
  states_.Reset(shape_.query_heads, shape_.head_dim);
  Layer& l = layers_[layer.value];
  std::vector<KvHeadId> moved;
  if (l.ahead != nullptr) {
    const SelectCall ahead = std::exchange(l.ahead, nullptr);
    KV_RETURN_IF_ERROR(Finish(layer, ahead, l.ahead_end));
    moved = MovedHeads(shape_, l.asked.data(), call.q, options_.prefetch_cosine);
    stats_.asked_ahead += shape_.kv_heads;
    stats_.asked_again += moved.size();
  } else {
    moved = all_heads_;
  }
  if (moved.empty()) return OkStatus();
  // Some heads' shards cannot confirm for all.
  asked_end_ = moved.size() == shape_.kv_heads ? window_.window_first(layer).value : 0;
  asked_ = Ask(layer, call.q, moved);
  return OkStatus();
}

Status AttentionIceCache::Collect(LayerId layer) {
  if (asked_ == nullptr) return OkStatus();
  return Finish(layer, std::exchange(asked_, nullptr), asked_end_);
}

void AttentionIceCache::Leave(LayerId layer, const TokenCall& call) {
  Layer& l = layers_[layer.value];
  appender_.Confirm(layer, l.confirmed);
  if (options_.layer_reuse > 1 && AnchorOf(layer) == nullptr) l.selection.RememberWhere();
  if (options_.prefetch) AskAhead(layer, call.q);
}

const LayerSelection* AttentionIceCache::AnchorOf(LayerId layer) const {
  const uint32_t behind = layer.value % std::max(1u, options_.layer_reuse);
  return behind == 0 ? nullptr : &layers_[layer.value - behind].selection;
}

// At random, or checks would fall on the same layers again and again (splitmix64).
bool AttentionIceCache::Sampled() {
  if (options_.check_every == 0) return false;
  uint64_t x = ++asks_ * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) % options_.check_every == 0;
}

SelectParams AttentionIceCache::Params(LayerId layer) {
  SelectParams params;
  params.layer = layer;
  params.max_pages = options_.max_grown_pages();
  params.read_cap = options_.read_cap;
  params.min_mass = options_.min_mass;
  params.check = Sampled();
  params.residual = options_.residual;
  params.int8 = options_.int8;
  params.deadline = options_.select_deadline;
  return params;
}

// The appended tokens that wait for their confirmation end where the window begins.
SelectCall AttentionIceCache::Ask(LayerId layer, const float* queries,
                                  std::span<const KvHeadId> heads) {
  SelectParams params = Params(layer);
  params.queries = queries;
  params.heads = heads;
  params.append = appender_.tokens(layer);
  params.append_first =
      params.append.empty() ? window_.window_first(layer) : appender_.first(layer);
  layers_[layer.value].selection.Begin(
      heads,
      {TokenPos(window_.sink_count(layer)), window_.window_first(layer),
       window_.window_first(layer).value},
      AnchorOf(layer));
  return client_.StartSelect(context_, params, layers_[layer.value].selection);
}

// The question of the token to come, whose K and V are not known yet; but the token that it will
// push out of the window is.
void AttentionIceCache::AskAhead(LayerId layer, const float* queries) {
  Layer& l = layers_[layer.value];
  l.asked.assign(queries, queries + size_t{shape_.query_heads} * shape_.head_dim);
  l.appended = appender_.tokens(layer);
  SelectParams params = Params(layer);
  params.append_first = l.appended.empty() ? window_.window_first(layer) : appender_.first(layer);
  if (window_.PeekLeaving(layer, &left_)) l.appended.push_back(left_);
  l.ahead_end = params.append_first.value + static_cast<uint32_t>(l.appended.size());
  params.queries = l.asked.data();
  params.append = l.appended;
  params.deadline = limits::kPrefetchDeadline;
  l.selection.Begin(all_heads_,
                    {TokenPos(window_.sink_count(layer)), TokenPos(l.ahead_end), l.ahead_end},
                    AnchorOf(layer));
  l.ahead = client_.StartSelect(context_, params, l.selection);
}

Status AttentionIceCache::Finish(LayerId layer, const SelectCall& call, uint32_t append_end) {
  KV_ASSIGN_OR_RETURN(const SelectOutcome outcome,
                      client_.FinishSelect(call, options_.select_deadline));
  stats_.bytes_moved += outcome.bytes_moved;
  stats_.select_wait += outcome.waiting;
  stats_.transfer += outcome.sending + outcome.handling;
  stats_.server_select_ns += outcome.server_select_ns;
  stats_.slowest_select_ns += outcome.slowest_select_ns;
  Layer& l = layers_[layer.value];
  if (!outcome.complete || l.selection.any_missing()) ++stats_.degraded_steps;
  if (l.selection.pages_max() > options_.max_pages()) ++stats_.grown_steps;
  if (outcome.confirmed) l.confirmed = std::max(l.confirmed, TokenPos(append_end));
  return OkStatus();
}

void AttentionIceCache::AddLocal(LayerId layer, const TokenCall& call,
                                 std::vector<AttentionItem>* items) {
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    for (const TokenRows& rows :
         {window_.sinks(layer, KvHeadId(h)), window_.window(layer, KvHeadId(h))}) {
      if (rows.count == 0) continue;
      items->push_back({call.queries(shape_, h), GroupStates(shape_, states_, h), rows, {}, {}});
      stats_.attended_tokens += uint64_t{rows.count} * shape_.group();
    }
    stats_.heads += shape_.group();
  }
}

void AttentionIceCache::AddSelected(LayerId layer, const TokenCall& call,
                                    std::vector<AttentionItem>* items) {
  LayerSelection& selection = layers_[layer.value].selection;
  const uint32_t group = shape_.group();
  for (const KvHeadId h : all_heads_) {
    const float* const queries = call.queries(shape_, h.value);
    const AttentionStateRef states = GroupStates(shape_, states_, h.value);
    if (!caches_.empty()) {
      const PageCache& pages = selection.caches()[h.value];
      if (!pages.selected().empty()) {
        items->push_back({queries, states, {}, pages.view(), pages.selected()});
      }
      stats_.attended_tokens += uint64_t{pages.selected_tokens()} * group;
    }
    LayerSelection::Head& head = selection.head(h);
    // Tokens that left the window and that nothing the shard said covers: it may not have them yet.
    uint32_t position = appender_.first(layer).value;
    for (const LayerRows& token : appender_.tokens(layer)) {
      if (head.arrived && position++ < head.covered_end) continue;
      items->push_back({queries, states, token.view(h), {}, {}});
      stats_.attended_tokens += group;
    }
    if (head.arrived && !head.residual.empty()) {
      float* const flat = head.residual.data();
      MergeStates({group, shape_.head_dim, flat, flat + group, flat + 2 * size_t{group}}, states);
    }
  }
}

}  // namespace icecache
