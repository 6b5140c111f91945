#include "tests/bench/accuracy_attention.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/distance.h"
#include "tests/bench/measure.h"
#include "worker/token_loop.h"

namespace icecache {
namespace {

constexpr uint32_t kKeptSelections = 3;  // IceCacheOptions::resident_multiple

TokenRows Part(TokenRows rows, uint32_t first, uint32_t count) {
  rows.k += first * rows.row_bytes();
  rows.v += first * rows.row_bytes();
  rows.count = count;
  return rows;
}

BuildHints HintsOf(const ReadDocument& document, size_t slice, uint64_t seed) {
  BuildHints hints;
  hints.query_energy = document.energy[slice];
  hints.queries = document.queries[slice];
  hints.query_group = document.shape.group();
  hints.seed = seed;
  return hints;
}

// `layout`: in, of the leader, when `policy` is empty; out, else.
Result<IndexedSlice> BuildSlice(const BuildHints& hints, const TokenRows& rows,
                                const AccuracyMethod& method, bool leads, PageLayout* layout) {
  IndexedSlice built;
  built.store = std::make_unique<PageStore>(rows.dtype, rows.head_dim);
  if (leads) {
    built.policy = method.Make(rows.dtype, rows.head_dim);
    KV_ASSIGN_OR_RETURN(*layout, built.policy->Build(rows, hints));
  }
  KV_RETURN_IF_ERROR(built.store->ApplyLayout(rows, *layout));
  return built;
}

}  // namespace

Result<IndexedDocument> IndexDocument(const ReadDocument& document, const AccuracyMethod& method,
                                      const SparseBudget& budget) {
  IndexedDocument index;
  const double begin = ThreadCpuMicros();
  std::vector<PageLayout> layouts(document.shape.kv_heads);
  const uint32_t sinks = std::min(budget.sink_tokens, document.tokens);
  const uint32_t window = std::min(budget.window_tokens, document.tokens - sinks);
  for (uint16_t l = 0; l < document.shape.layers; ++l) {
    for (uint16_t h = 0; h < document.shape.kv_heads; ++h) {
      const LayerId layer(l);
      const KvHeadId head(h);
      if (l < method.dense) {
        index.slices.emplace_back();
        continue;
      }
      const TokenRows rows =
          Part(document.kv->rows(layer, head), sinks, document.tokens - sinks - window);
      KV_ASSIGN_OR_RETURN(IndexedSlice slice,
                          BuildSlice(HintsOf(document, document.slice(layer, head), method.seed),
                                     rows, method, method.leads(layer), &layouts[h]));
      slice.first = sinks;
      if (slice.policy) {
        slice.policy->VisitCounters([&](std::string_view name, double value) {
          if (name == "index_bytes") index.index_bytes += value;
        });
      }
      index.slices.push_back(std::move(slice));
    }
  }
  index.build_ms = (ThreadCpuMicros() - begin) / 1e3;
  return index;
}

PolicyAttention::PolicyAttention(ReadDocument& document, IndexedDocument& index,
                                 AttentionBackend& backend, const AccuracyMethod& method,
                                 const SparseBudget& budget, bool grow)
    : document_(document),
      index_(index),
      backend_(backend),
      method_(method),
      budget_(budget),
      grow_(grow),
      max_pages_(budget.chosen() / limits::kPageTokens),
      dense_(document.shape, *document.kv, backend),
      token_(document.shape, TokenPos(0), 1),
      leaders_(document.shape.kv_heads),
      leader_plans_(document.shape.kv_heads),
      leader_layouts_(document.shape.kv_heads),
      chosen_(document.shape.kv_heads) {
  Begin();
}

void PolicyAttention::Begin() {
  document_.kv->Truncate(document_.tokens);
  // Pages of the document that the worker has kept stay with it, as they do from fork to fork.
  if (slices_.empty()) {
    slices_.resize(index_.slices.size());
    for (size_t at = 0; at < slices_.size(); ++at) slices_[at].energy.Assign(document_.energy[at]);
  }
  for (Slice& slice : slices_) {
    slice.tail = {};
    slice.selected = false;
    std::erase_if(slice.kept, [](const Kept& page) { return page.tail; });
  }
}

// The token that has just left the window goes into the index.
Status PolicyAttention::AddToken(LayerId layer, KvHeadId head) {
  const TokenRows rows = document_.kv->rows(layer, head);
  const uint32_t fixed = budget_.sink_tokens + budget_.window_tokens;
  if (rows.count <= fixed) return OkStatus();
  const uint32_t left = rows.count - 1 - budget_.window_tokens;
  const size_t at = document_.slice(layer, head);
  const uint32_t indexed_end = index_.slices[at].first + index_.slices[at].store->token_count() +
                               (slices_[at].tail.store ? slices_[at].tail.store->token_count() : 0);
  if (left < indexed_end) return OkStatus();  // a document shorter than sinks and window
  IndexedSlice& slice = grow_ ? index_.slices[at] : slices_[at].tail;
  const TokenRows row = Part(rows, left, 1);
  if (!slice.store) {
    PageLayout none;
    KV_ASSIGN_OR_RETURN(slice, BuildSlice(HintsOf(document_, at, method_.seed), Part(rows, left, 0),
                                          method_, method_.leads(layer), &none));
    slice.first = left;
  }
  if (slice.policy) {
    KV_ASSIGN_OR_RETURN(leader_plans_[head.value], slice.policy->Insert(row, slice.store->kv()));
  }
  KV_RETURN_IF_ERROR(slice.store->ApplyInsert(leader_plans_[head.value], row));
  if (!grow_ || method_.recluster == 0 || ++slices_[at].added < method_.recluster)
    return OkStatus();
  return Rebuild(layer, head, left + 1);
}

BuildHints PolicyAttention::RebuildHints(size_t at) const {
  BuildHints hints = HintsOf(document_, at, method_.seed);
  if (method_.energy == AccuracyMethod::Energy::kRecent)
    hints.query_energy = slices_[at].energy.value();
  if (method_.energy == AccuracyMethod::Energy::kNone) hints.query_energy = {};
  return hints;
}

Status PolicyAttention::Rebuild(LayerId layer, KvHeadId head, uint32_t end) {
  const size_t at = document_.slice(layer, head);
  const uint32_t first = index_.slices[at].first;
  const TokenRows rows = Part(document_.kv->rows(layer, head), first, end - first);
  KV_ASSIGN_OR_RETURN(index_.slices[at],
                      BuildSlice(RebuildHints(at), rows, method_, method_.leads(layer),
                                 &leader_layouts_[head.value]));
  index_.slices[at].first = first;
  slices_[at].added = 0;
  slices_[at].kept.clear();  // pages have new names
  slices_[at].last.clear();
  slices_[at].selected = false;
  return OkStatus();
}

void PolicyAttention::AttendPages(const IndexedSlice& slice, std::span<const PageId> pages,
                                  const float* queries, const AttentionStateRef& states) {
  if (!pages.empty()) backend_.AttendPages(queries, slice.store->kv(), pages, states);
}

// One ranking over the document's pages and the added ones, as in a chain of segments
// (cacheserver/context): pages that lose are attended to exactly, where there is a residual.
void PolicyAttention::Choose(size_t at, size_t head, const SelectRequest& request,
                             const AttentionStateRef& states, std::vector<Kept>* chosen) {
  IndexedSlice& main = index_.slices[at];
  IndexedSlice& tail = slices_[at].tail;
  Selection& selection = leaders_[head];
  const auto add = [&](Selection& from, const IndexedSlice& slice, bool is_tail) {
    for (const SelectedPage& page : from.pages) {
      const uint32_t fill = slice.store->kv().pages[page.page.value].fill;
      chosen->push_back({page.page.value, fill, is_tail, page.log_mass});
    }
    if (from.residual.heads() == request.group) MergeStates(from.residual.ref(), states);
    selection_stats_.tokens_read += from.tokens_read;
  };
  main.policy->Select(request, main.store->kv(), &selection);
  add(selection, main, false);
  if (!tail.store || tail.store->page_count() == 0) return;
  tail.policy->Select(request, tail.store->kv(), &tail_selection_);
  add(tail_selection_, tail, true);
  std::stable_sort(chosen->begin(), chosen->end(),
                   [](const Kept& a, const Kept& b) { return a.log_mass > b.log_mass; });
  while (chosen->size() > request.max_pages) {
    const Kept& loser = chosen->back();
    const PageId page(loser.page);
    if (request.residual)
      AttendPages(loser.tail ? tail : main, {&page, 1}, request.queries, states);
    chosen->pop_back();
  }
}

void PolicyAttention::Select(LayerId layer, KvHeadId head, const float* queries,
                             const AttentionStateRef& states) {
  const size_t at = document_.slice(layer, head);
  SelectRequest request;
  request.queries = queries;
  request.group = document_.shape.group();
  request.max_pages = max_pages_;
  request.read_cap = method_.read_cap;
  request.min_mass = method_.min_mass;
  request.rank = method_.rank;
  request.residual = method_.residual;
  std::vector<Kept>& chosen = chosen_[head.value];
  slices_[at].energy.Observe(queries, request.group, document_.shape.head_dim);
  if (method_.leads(layer)) {
    chosen.clear();
    Choose(at, head.value, request, states, &chosen);
  }
  for (const bool tail : {false, true}) {
    pages_.clear();
    for (const Kept& page : chosen)
      if (page.tail == tail) pages_.emplace_back(page.page);
    AttendPages(tail ? slices_[at].tail : index_.slices[at], pages_, queries, states);
  }
  Count(at, chosen, leaders_[head.value]);
  if (probe_) ProbePages(layer, head, queries, chosen);
  for (const Kept& page : chosen) stats_.attended_tokens += uint64_t{page.fill} * request.group;
}

void PolicyAttention::Count(size_t at, const std::vector<Kept>& chosen,
                            const Selection& selection) {
  Slice& slice = slices_[at];
  SelectionStats& s = selection_stats_;
  const auto same = [](const Kept& a) {
    return [&a](const Kept& b) { return a.page == b.page && a.tail == b.tail; };
  };
  const size_t row_bytes = 2 * document_.shape.row_bytes();
  uint64_t rows = 0;
  for (const Kept& page : chosen) {
    const auto kept = std::find_if(slice.kept.begin(), slice.kept.end(), same(page));
    if (kept == slice.kept.end()) {
      ++s.fetched;
      rows += page.fill;
    } else {
      if (kept->fill != page.fill) {
        ++s.refetched;
        rows += kept->fill < page.fill ? page.fill - kept->fill : page.fill;
      }
      slice.kept.erase(kept);
    }
    slice.kept.insert(slice.kept.begin(), page);
    s.repeated += slice.selected && std::any_of(slice.last.begin(), slice.last.end(), same(page));
  }
  if (slice.kept.size() > kKeptSelections * max_pages_)
    slice.kept.resize(kKeptSelections * max_pages_);
  if (slice.selected) s.comparable += chosen.size();
  slice.selected = true;
  slice.last = chosen;
  ++s.selections;
  s.pages += chosen.size();
  // A policy of tokens returns no pages: the chosen rows themselves would travel.
  const bool tokens = chosen.empty() && selection.residual.heads() > 0;
  if (tokens) rows = std::min(selection.tokens_read, max_pages_ * limits::kPageTokens);
  s.fetched_bytes += rows * row_bytes;
  if (!tokens) s.fetched_bytes += selection.residual.flat().size() * sizeof(float);
}

// How many tokens of the pages are among the exact best that as many pages could hold.
void PolicyAttention::ProbePages(LayerId layer, KvHeadId head, const float* queries,
                                 const std::vector<Kept>& chosen) {
  const size_t at = document_.slice(layer, head);
  const TokenRows all = document_.kv->rows(layer, head);
  const uint32_t fixed = budget_.sink_tokens + budget_.window_tokens;
  if (chosen.empty() || all.count <= fixed) return;
  const TokenRows rows = Part(all, budget_.sink_tokens, all.count - fixed);
  const uint32_t group = document_.shape.group();
  const uint32_t best = std::min(rows.count, max_pages_ * limits::kPageTokens);
  scores_.resize(size_t{group} * rows.count);
  DotRows(queries, group, rows.k, rows.dtype, rows.count, rows.head_dim, scores_.data(),
          rows.count);
  std::vector<bool> hot(rows.count);
  for (uint32_t g = 0; g < group; ++g) {
    const float* scores = scores_.data() + size_t{g} * rows.count;
    sorted_.assign(scores, scores + rows.count);
    std::nth_element(sorted_.begin(), sorted_.begin() + (best - 1), sorted_.end(),
                     std::greater<>());
    for (uint32_t t = 0; t < rows.count; ++t)
      if (scores[t] >= sorted_[best - 1]) hot[t] = true;
  }
  for (const Kept& page : chosen) {
    const IndexedSlice& slice = page.tail ? slices_[at].tail : index_.slices[at];
    for (const uint32_t token : slice.store->tokens(page.page)) {
      const uint32_t t = slice.first + token - budget_.sink_tokens;
      selection_stats_.hot_tokens += t < hot.size() && hot[t];
    }
    selection_stats_.paged_tokens += page.fill;
    ++selection_stats_.probed_pages;
  }
}

Status PolicyAttention::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                               const float* k, const float* v, float* out) {
  if (layer.value < method_.dense) return dense_.Attend(layer, first, tokens, q, k, v, out);
  const ModelShape& shape = document_.shape;
  return ForEachToken(shape, first, tokens, q, k, v, out, [&](const TokenCall& call) -> Status {
    const AttentionTimer timer(&stats_.attention);
    token_.StoreToken(call.position, call.k, call.v);
    document_.kv->Append(layer, token_);
    states_.Reset(shape.query_heads, shape.head_dim);
    for (uint16_t h = 0; h < shape.kv_heads; ++h) {
      const KvHeadId head(h);
      KV_RETURN_IF_ERROR(AddToken(layer, head));
      const TokenRows rows = document_.kv->rows(layer, head);
      const AttentionStateRef states = GroupStates(shape, states_, h);
      const uint32_t sinks = std::min(budget_.sink_tokens, rows.count);
      const uint32_t window = std::min(budget_.window_tokens, rows.count - sinks);
      backend_.AttendRows(call.queries(shape, h), Part(rows, 0, sinks), states);
      backend_.AttendRows(call.queries(shape, h), Part(rows, rows.count - window, window), states);
      CountAttended(&stats_, shape.group(), sinks + window);
      Select(layer, head, call.queries(shape, h), states);
    }
    FinishStates(states_.ref(), call.out);
    return OkStatus();
  });
}

}  // namespace icecache
