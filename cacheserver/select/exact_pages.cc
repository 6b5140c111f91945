#include "cacheserver/select/exact_pages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {
constexpr uint32_t kChunk = 256;  // pages whose weights are on the stack at a time
}

float SaturatedLogit(float x) {
  constexpr float kLargest = std::numeric_limits<float>::max() / 4;
  if (!(x > -kLargest)) return -kLargest;  // also NaN, from inf - inf
  return std::min(x, kLargest);
}

void HeadTotals::Assign(const PageScores& scores, const float* local_lse) {
  lse.assign(scores.group, kEmptyMax);
  share.assign(scores.group, 1.0f);
  for (uint32_t h = 0; h < scores.group; ++h) {
    const float* mass = scores.log_mass + h * scores.stride;
    const float max = MaxOf(mass, scores.page_count);
    if (max == kEmptyMax) continue;
    double sum = 0;
    std::array<float, kChunk> weights;
    for (uint32_t begin = 0; begin < scores.page_count; begin += kChunk)
      sum += ExpShifted(mass + begin, std::min(kChunk, scores.page_count - begin), max,
                        weights.data());
    lse[h] = max + static_cast<float>(std::log(sum));
    if (local_lse != nullptr) share[h] = 1.0f / (1.0f + std::exp(local_lse[h] - lse[h]));
  }
}

void RankPages(const PageScores& scores, const HeadTotals& totals, GroupRank by,
               std::vector<float>* rank) {
  rank->assign(scores.page_count, by == GroupRank::kMaxToken ? kEmptyMax : 0.0f);
  std::array<float, kChunk> weights;
  for (uint32_t h = 0; h < scores.group; ++h) {
    const float* mass = scores.log_mass + h * scores.stride;
    const float* top = scores.top + h * scores.stride;
    if (totals.lse[h] == kEmptyMax) continue;
    if (by == GroupRank::kMaxToken) {
      for (uint32_t p = 0; p < scores.page_count; ++p)
        (*rank)[p] = std::max((*rank)[p], top[p] - totals.lse[h]);
      continue;
    }
    for (uint32_t begin = 0; begin < scores.page_count; begin += kChunk) {
      const uint32_t n = std::min(kChunk, scores.page_count - begin);
      ExpShifted(mass + begin, n, totals.lse[h], weights.data());
      float* out = rank->data() + begin;
      for (uint32_t i = 0; i < n; ++i) {
        const float w = totals.share[h] * weights[i];
        out[i] = by == GroupRank::kMassSum ? out[i] + w : std::max(out[i], w);
      }
    }
  }
}

void TopPages(std::span<const float> rank, uint32_t count, std::vector<uint32_t>* top) {
  top->resize(rank.size());
  std::iota(top->begin(), top->end(), 0u);
  const auto better = [rank](uint32_t a, uint32_t b) {
    return rank[a] != rank[b] ? rank[a] > rank[b] : a < b;
  };
  if (count < top->size()) {
    std::nth_element(top->begin(), top->begin() + count, top->end(), better);
    top->resize(count);
  }
  std::sort(top->begin(), top->end(), better);
}

float MassShare(const PageScores& scores, const HeadTotals& totals, uint32_t i) {
  float sum = 0;
  for (uint32_t h = 0; h < scores.group; ++h) {
    const float mass = scores.log_mass[h * scores.stride + i];
    if (mass != kEmptyMax) sum += std::exp(std::min(0.0f, mass - totals.lse[h]));
  }
  return sum / static_cast<float>(scores.group);
}

float CutAtMass(const PageScores& scores, const HeadTotals& totals, float min_mass,
                std::vector<uint32_t>* order) {
  float mass = 0;
  for (size_t n = 0; n < order->size(); ++n) {
    mass += MassShare(scores, totals, (*order)[n]);
    if (min_mass > 0 && mass >= min_mass) {
      order->resize(n + 1);
      break;
    }
  }
  return std::min(mass, 1.0f);
}

float LargestLogMass(const PageScores& scores, uint32_t i) {
  float best = kEmptyMax;
  for (uint32_t h = 0; h < scores.group; ++h)
    best = std::max(best, scores.log_mass[h * scores.stride + i]);
  return best;
}

void ExactPages::Score(const SelectRequest& request, const PagedKv& kv,
                       std::span<const PageId> pages) {
  constexpr uint32_t kTokens = limits::kPageTokens;
  group_ = request.group;
  tokens_read_ = 0;
  pages_.assign(pages.begin(), pages.end());
  const size_t stride = pages.size() * kTokens;
  logits_.resize(group_ * stride);
  log_mass_.resize(group_ * pages.size());
  top_.resize(group_ * pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    const PageView& page = kv.pages[pages[i].value];
    KV_CHECK(page.k != nullptr && page.fill >= 1 && page.fill <= kTokens);
    if (i + 1 < pages.size() && kv.pages[pages[i + 1].value].k != nullptr) {
      const std::byte* next = kv.pages[pages[i + 1].value].k;
      for (uint32_t line = 0; line < 8; ++line) __builtin_prefetch(next + 64 * line);
    }
    tokens_read_ += page.fill;
    DotRows(request.queries, group_, page.k, kv.dtype, page.fill, kv.head_dim,
            logits_.data() + i * kTokens, stride);
    for (uint32_t h = 0; h < group_; ++h) {
      float* x = logits_.data() + h * stride + i * kTokens;
      for (uint32_t r = 0; r < page.fill; ++r) x[r] = SaturatedLogit(x[r]);
      for (uint32_t r = page.fill; r < kTokens; ++r) x[r] = kEmptyMax;
      std::array<float, kTokens> weights;
      const float max = MaxOf(x, page.fill);
      const float sum = ExpShifted(x, page.fill, max, weights.data());
      top_[h * pages.size() + i] = max;
      log_mass_[h * pages.size() + i] = max + std::log(sum);
    }
  }
}

PageScores ExactPages::scores() const {
  return {group_, static_cast<uint32_t>(pages_.size()), pages_.size(), log_mass_.data(),
          top_.data()};
}

const float* ExactPages::logits(uint32_t head, uint32_t i) const {
  return logits_.data() + (head * pages_.size() + i) * limits::kPageTokens;
}

void ExactPages::AttendTo(const PagedKv& kv, std::span<const uint8_t> take,
                          const AttentionStateRef& states) {
  constexpr uint32_t kTokens = limits::kPageTokens;
  KV_CHECK(take.size() == pages_.size() && states.heads == group_);
  // One maximum for all pages, so that the sums are rescaled once.
  for (uint32_t h = 0; h < group_; ++h) {
    float max = states.denom[h] > 0 ? states.max[h] : kEmptyMax;
    for (size_t i = 0; i < pages_.size(); ++i)
      if (take[i] != 0) max = std::max(max, top_[h * pages_.size() + i]);
    if (max == kEmptyMax) continue;
    const float keep = states.denom[h] > 0 ? std::exp(states.max[h] - max) : 0.0f;
    for (uint32_t j = 0; j < states.head_dim; ++j) states.row(h)[j] *= keep;
    states.denom[h] *= keep;
    states.max[h] = max;
  }
  weights_.resize(size_t{group_} * kTokens);
  for (size_t i = 0; i < pages_.size(); ++i) {
    if (take[i] == 0) continue;
    const PageView& page = kv.pages[pages_[i].value];
    for (uint32_t h = 0; h < group_; ++h) {
      states.denom[h] += ExpShifted(logits(h, static_cast<uint32_t>(i)), page.fill, states.max[h],
                                    weights_.data() + h * kTokens);
    }
    AddWeightedRows(weights_.data(), kTokens, group_, page.v, kv.dtype, page.fill, kv.head_dim,
                    states.out);
  }
}

}  // namespace icecache
