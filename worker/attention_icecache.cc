#include "worker/attention_icecache.h"

#include <algorithm>
#include <cstring>

#include "common/limits.h"
#include "worker/token_loop.h"

namespace icecache {

uint32_t IceCacheOptions::max_pages() const {
  return std::min(limits::kPagesPerSelectMax, budget.chosen() / limits::kPageTokens);
}

AttentionIceCache::AttentionIceCache(const ModelShape& shape, CacheClient& client,
                                     AttentionBackend& backend, const IceCacheOptions& options)
    : shape_(shape),
      client_(client),
      backend_(backend),
      options_(options),
      arena_(shape.page_bytes(), options.frames),
      appender_(shape),
      token_(shape, TokenPos(0), 1),
      left_(shape, TokenPos(0), 1),
      heads_(shape.kv_heads) {
  const uint32_t capacity = options.max_pages() * std::max(1u, options.resident_multiple);
  if (capacity == 0) return;
  caches_.reserve(size_t{shape.layers} * shape.kv_heads);
  for (uint32_t i = 0; i < shape.layers * shape.kv_heads; ++i) {
    caches_.emplace_back(shape, capacity, arena_);
  }
}

void AttentionIceCache::Begin(const ContextHandle& context, const SinkWindow& window,
                              std::span<const wire::SegmentInfo> segments) {
  context_ = context;
  window_ = window;
  appender_.Clear();
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
  token_.StoreToken(call.position, call.k, call.v);
  if (const auto left = window_.Append(layer, token_, &left_)) {
    KV_RETURN_IF_ERROR(appender_.Push(layer, left_, *left));
  }
  step_layer_ = layer;
  for (Head& head : heads_) {
    head.arrived = false;
    head.missing.clear();
  }
  states_.Reset(shape_.query_heads, shape_.head_dim);

  SelectParams params;
  params.layer = layer;
  params.queries = call.q;
  params.max_pages = options_.max_pages();
  params.read_cap = options_.read_cap;
  params.min_mass = options_.min_mass;
  params.residual = options_.residual;
  params.append = appender_.tokens(layer);
  params.append_first =
      params.append.empty() ? window_.window_first(layer) : appender_.first(layer);
  params.deadline = options_.select_deadline;
  const uint64_t bytes_before = client_.bytes_moved();
  KV_ASSIGN_OR_RETURN(const SelectOutcome outcome, client_.Select(context_, params, *this, [&] {
    local_status_ = AttendLocal(layer, call);
  }));
  KV_RETURN_IF_ERROR(local_status_);
  stats_.bytes_moved += client_.bytes_moved() - bytes_before;
  stats_.select_wait += outcome.waiting;
  stats_.transfer += outcome.sending + outcome.handling;
  stats_.server_select_ns += outcome.server_select_ns;
  stats_.slowest_select_ns += outcome.slowest_select_ns;
  const bool missing = std::any_of(heads_.begin(), heads_.end(),
                                   [](const Head& head) { return !head.missing.empty(); });
  if (!outcome.complete || missing) ++stats_.degraded_steps;

  KV_RETURN_IF_ERROR(AttendSelected(layer, call));
  FinishStates(states_.ref(), call.out);
  if (outcome.confirmed) {
    appender_.Confirm(
        layer, TokenPos(params.append_first.value + static_cast<uint32_t>(params.append.size())));
  }
  return OkStatus();
}

Status AttentionIceCache::AttendLocal(LayerId layer, const TokenCall& call) {
  const AttentionTimer timer(&stats_.attention);
  items_.clear();
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    for (const TokenRows& rows :
         {window_.sinks(layer, KvHeadId(h)), window_.window(layer, KvHeadId(h))}) {
      if (rows.count == 0) continue;
      items_.push_back({call.queries(shape_, h), GroupStates(shape_, states_, h), rows, {}, {}});
      stats_.attended_tokens += uint64_t{rows.count} * shape_.group();
    }
    stats_.heads += shape_.group();
  }
  return backend_.Attend(items_);
}

Status AttentionIceCache::AttendSelected(LayerId layer, const TokenCall& call) {
  const AttentionTimer timer(&stats_.attention);
  items_.clear();
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    const float* const queries = call.queries(shape_, h);
    const AttentionStateRef states = GroupStates(shape_, states_, h);
    if (!caches_.empty()) {
      const PageCache& pages = cache(layer, KvHeadId(h));
      if (!pages.selected().empty()) {
        items_.push_back({queries, states, {}, pages.view(), pages.selected()});
      }
      stats_.attended_tokens += uint64_t{pages.selected_tokens()} * shape_.group();
    }
    Head& head = heads_[h];
    if (!head.arrived) {
      // The shard may not have taken these yet, and nothing that it said covers them.
      for (const LayerRows& token : appender_.tokens(layer)) {
        items_.push_back({queries, states, token.view(KvHeadId(h)), {}, {}});
        stats_.attended_tokens += shape_.group();
      }
    } else if (!head.residual.empty()) {
      float* const flat = head.residual.data();
      const uint32_t group = shape_.group();
      MergeStates({group, shape_.head_dim, flat, flat + group, flat + 2 * size_t{group}}, states);
    }
  }
  return backend_.Attend(items_);
}

void AttentionIceCache::ListResident(KvHeadId head, std::vector<wire::ResidentPage>* pages) {
  if (!caches_.empty()) cache(step_layer_, head).ListResident(pages);
}

void AttentionIceCache::OnSelection(const wire::HeadSelection& selection,
                                    std::vector<wire::ResidentPage>* refetch) {
  Head& head = heads_[selection.head.value];
  head.arrived = true;
  head.residual = selection.residual;
  for (const wire::PagePayload& page : selection.pages) {
    if (page.place != wire::PagePlace::kAttended) continue;
    ++stats_.remote_pages;
    stats_.attended_tokens += uint64_t{page.fill} * shape_.group();
  }
  if (caches_.empty()) return;
  PageCache& pages = cache(step_layer_, selection.head);
  pages.BeginStep();
  const auto count = [&](const wire::PagePayload& page, PageCache::Outcome outcome) {
    switch (outcome) {
      case PageCache::Outcome::kHit:
        ++stats_.page_hits;
        break;
      case PageCache::Outcome::kReceived:
        ++stats_.page_misses;
        if (page.place == wire::PagePlace::kMapped) ++stats_.mapped_pages;
        break;
      case PageCache::Outcome::kBad:
        // A frame may have been reused between the reply and the copy: nothing is broken then.
        ++(page.place == wire::PagePlace::kMapped ? stats_.mapped_gone : stats_.bad_pages);
        head.missing.push_back({page.segment, page.page, page.version, page.fill});
        break;
      case PageCache::Outcome::kRepeated:
        ++stats_.bad_pages;
        break;
    }
  };
  pages.ApplyAll(selection.pages, indexed_begin(), indexed_end(), count);
  *refetch = head.missing;
}

void AttentionIceCache::OnRefetched(KvHeadId head, const wire::PagePayload& page) {
  auto& missing = heads_[head.value].missing;
  const auto wanted = std::find_if(missing.begin(), missing.end(), [&](const auto& m) {
    return m.segment == page.segment && m.page == page.page;
  });
  if (wanted == missing.end()) return;
  // Another version has other rows than those which the selection left to this page. More rows than
  // then were pending at that time, and in the residual.
  if (page.version != wanted->version || page.fill < wanted->fill || page.from != 0) return;
  const auto outcome =
      cache(step_layer_, head).Apply(page, indexed_begin(), indexed_end(), wanted->fill);
  if (outcome == PageCache::Outcome::kReceived) {
    ++stats_.page_misses;
    missing.erase(wanted);
  } else {
    ++stats_.bad_pages;
  }
}

}  // namespace icecache
