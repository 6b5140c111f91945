#include "cacheserver/select/budget_choice.h"

#include <algorithm>
#include <cmath>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kRows = limits::kPageTokens;

struct Scratch {
  HeadTotals totals;
  std::vector<float> rank;
  std::vector<uint32_t> order, slots;
  std::vector<PageId> read;
  ExactPages exact;
  TokenReader reader;
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

// out->pages from `order`, with exact masses where the rows are in memory.
template <typename LogMass>
void Return(std::span<const uint32_t> order, const SelectRequest& request, const PagedKv& kv,
            LogMass&& estimate, Selection* out) {
  Scratch& s = ThreadScratch();
  s.read.clear();
  for (const uint32_t p : order)
    if (kv.pages[p].k != nullptr) s.read.emplace_back(p);
  s.exact.Score(request, kv, s.read);
  out->tokens_read += s.exact.tokens_read();
  uint32_t exact = 0;
  for (const uint32_t p : order) {
    const bool in_memory = kv.pages[p].k != nullptr;
    out->pages.push_back(
        {PageId(p), in_memory ? LargestLogMass(s.exact.scores(), exact) : estimate(p)});
    exact += in_memory;
  }
}

// Of the weight, or of the tokens when nothing has weight.
float Share(double sum, double total, size_t chosen, size_t tokens) {
  if (total > 0) return static_cast<float>(std::min(1.0, sum / total));
  return tokens > 0 ? static_cast<float>(chosen) / static_cast<float>(tokens) : 0.0f;
}

// The pages that hold most weight.
void ReturnPagesOf(std::span<const float> weight, double total, const SelectRequest& request,
                   const PagedKv& kv, Selection* out) {
  Scratch& s = ThreadScratch();
  s.rank.assign(kv.page_count, 0.0f);
  for (uint32_t p = 0; p < kv.page_count; ++p)
    for (uint32_t r = 0; r < kv.pages[p].fill; ++r)
      s.rank[p] += std::max(0.0f, weight[p * kRows + r]);
  TopPages(s.rank, request.max_pages, &s.order);
  double sum = 0;
  for (size_t n = 0; n < s.order.size(); ++n) {
    sum += s.rank[s.order[n]];
    if (request.min_mass > 0 && sum >= request.min_mass * total) s.order.resize(n + 1);
  }
  uint32_t tokens = 0, returned = 0;
  for (uint32_t p = 0; p < kv.page_count; ++p) tokens += kv.pages[p].fill;
  for (const uint32_t p : s.order) returned += kv.pages[p].fill;
  out->covered_mass = Share(sum, total, returned, tokens);
  const auto log_of = [&](uint32_t p) { return std::log(std::max(1e-30f, s.rank[p])); };
  Return(s.order, request, kv, log_of, out);
}

}  // namespace

void ScoreAllTokens(const SelectRequest& request, const PagedKv& kv, std::vector<float>* logits) {
  const size_t stride = size_t{kv.page_count} * kRows;
  logits->assign(request.group * stride, kEmptyMax);
  for (uint32_t p = 0; p < kv.page_count; ++p) {
    const PageView& page = kv.pages[p];
    if (page.k == nullptr) continue;
    DotRows(request.queries, request.group, page.k, kv.dtype, page.fill, kv.head_dim,
            logits->data() + p * kRows, stride);
    for (uint32_t h = 0; h < request.group; ++h) {
      float* x = logits->data() + h * stride + p * kRows;
      for (uint32_t r = 0; r < page.fill; ++r) x[r] = SaturatedLogit(x[r]);
    }
  }
}

void RankUnits(const SelectRequest& request, GroupRank by, std::span<const float> log_mass,
               std::vector<float>* rank) {
  Scratch& s = ThreadScratch();
  const auto count = static_cast<uint32_t>(log_mass.size() / request.group);
  const PageScores scores{request.group, count, count, log_mass.data(), log_mass.data()};
  s.totals.Assign(scores, request.local_lse);
  RankPages(scores, s.totals, by, rank);
  if (by != GroupRank::kMaxToken) return;
  const float best = MaxOf(rank->data(), count);
  if (best != kEmptyMax) ExpShifted(rank->data(), count, best, rank->data());
}

void ChoosePages(const PageScores& estimate, const SelectRequest& request, const PagedKv& kv,
                 Selection* out) {
  Scratch& s = ThreadScratch();
  s.totals.Assign(estimate, request.local_lse);
  RankPages(estimate, s.totals, request.rank, &s.rank);
  TopPages(s.rank, request.max_pages, &s.order);
  out->covered_mass = CutAtMass(estimate, s.totals, request.min_mass, &s.order);
  const auto log_of = [&](uint32_t p) { return LargestLogMass(estimate, p); };
  Return(s.order, request, kv, log_of, out);
}

void ChooseTokens(std::span<const float> rank, std::span<const float> weight,
                  const SelectRequest& request, const PagedKv& kv, Selection* out,
                  std::vector<uint32_t>* chosen) {
  Scratch& s = ThreadScratch();
  if (weight.empty()) weight = rank;
  double total = 0;
  size_t tokens = 0;
  s.slots.clear();
  for (uint32_t p = 0; p < kv.page_count; ++p) {
    tokens += kv.pages[p].fill;
    for (uint32_t r = 0; r < kv.pages[p].fill; ++r) {
      const uint32_t slot = p * kRows + r;
      total += std::max(0.0f, weight[slot]);
      if (kv.pages[p].k != nullptr && rank[slot] >= 0) s.slots.push_back(slot);
    }
  }
  if (!request.residual) return ReturnPagesOf(weight, total, request, kv, out);
  const auto better = [rank](uint32_t a, uint32_t b) {
    return rank[a] != rank[b] ? rank[a] > rank[b] : a < b;
  };
  const size_t budget = size_t{request.max_pages} * kRows;
  if (budget < s.slots.size()) {
    std::nth_element(s.slots.begin(), s.slots.begin() + static_cast<ptrdiff_t>(budget),
                     s.slots.end(), better);
    s.slots.resize(budget);
  }
  if (request.min_mass > 0) std::sort(s.slots.begin(), s.slots.end(), better);
  double sum = 0;
  for (size_t n = 0; n < s.slots.size(); ++n) {
    sum += std::max(0.0f, weight[s.slots[n]]);
    if (request.min_mass > 0 && sum >= request.min_mass * total) s.slots.resize(n + 1);
  }
  out->covered_mass = Share(sum, total, s.slots.size(), tokens);
  std::sort(s.slots.begin(), s.slots.end());
  s.reader.Read(request, kv, s.slots);
  s.reader.AttendTo(kv, out->residual.ref());
  out->tokens_read += static_cast<uint32_t>(s.slots.size());
  if (chosen != nullptr) *chosen = s.slots;
}

void TokenReader::Read(const SelectRequest& request, const PagedKv& kv,
                       std::span<const uint32_t> slots) {
  slots_.assign(slots.begin(), slots.end());
  logits_.resize(request.group * slots_.size());
  for (size_t i = 0; i < slots_.size();) {
    // Neighbours in one page are read in one go.
    size_t end = i + 1;
    while (end < slots_.size() && slots_[end] == slots_[i] + (end - i) && slots_[end] % kRows != 0)
      ++end;
    const PageView& page = kv.pages[slots_[i] / kRows];
    DotRows(request.queries, request.group, page.k + (slots_[i] % kRows) * kv.row_bytes(), kv.dtype,
            static_cast<uint32_t>(end - i), kv.head_dim, logits_.data() + i, slots_.size());
    i = end;
  }
  for (float& x : logits_) x = SaturatedLogit(x);
}

void TokenReader::AttendTo(const PagedKv& kv, const AttentionStateRef& states) {
  const size_t count = slots_.size();
  if (count == 0) return;
  thread_local AttentionStates chosen;
  chosen.Reset(states.heads, states.head_dim);
  const AttentionStateRef sum = chosen.ref();
  weights_.resize(logits_.size());
  for (uint32_t h = 0; h < states.heads; ++h) {
    const float max = MaxOf(logits(h), count);
    float* weights = weights_.data() + h * count;
    if (max == kEmptyMax) {
      std::fill(weights, weights + count, 0.0f);
      continue;
    }
    sum.max[h] = max;
    sum.denom[h] = ExpShifted(logits(h), count, max, weights);
  }
  for (size_t i = 0; i < count;) {
    size_t end = i + 1;
    while (end < count && slots_[end] == slots_[i] + (end - i) && slots_[end] % kRows != 0) ++end;
    const PageView& page = kv.pages[slots_[i] / kRows];
    AddWeightedRows(weights_.data() + i, count, states.heads,
                    page.v + (slots_[i] % kRows) * kv.row_bytes(), kv.dtype,
                    static_cast<uint32_t>(end - i), kv.head_dim, sum.out);
    i = end;
  }
  MergeStates(sum, states);
}

}  // namespace icecache
