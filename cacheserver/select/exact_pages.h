// Helpers shared by policies: exact scores of pages, ranking, and their part of the residual.
//
// All of it is scratch of one Select call on one thread; memory is kept between calls.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

// Row h of `log_mass` and `top`: per page the log of its softmax mass and its largest logit, of
// query head h. Rows are `stride` apart.
struct PageScores {
  uint32_t group = 0;
  uint32_t page_count = 0;
  size_t stride = 0;
  const float* log_mass = nullptr;
  const float* top = nullptr;
};

// The query heads' weights when their masses are added: their total mass, and the part of it that
// is indexed rather than held by the worker.
struct HeadTotals {
  std::vector<float> lse;    // [group] log-sum-exp over everything indexed
  std::vector<float> share;  // [group] indexed mass / (indexed + local), 1 without local_lse

  // lse[h] = log of the sum over pages of exp(log_mass).
  void Assign(const PageScores& scores, const float* local_lse);
};

// rank[i] for each page: larger is better. Cost: one exp per page and head.
void RankPages(const PageScores& scores, const HeadTotals& totals, GroupRank by,
               std::vector<float>* rank);

// Indices of the `count` largest of rank, best first; ties go to the lower index.
void TopPages(std::span<const float> rank, uint32_t count, std::vector<uint32_t>* top);

// Mean over heads of the share of mass that page i holds.
float MassShare(const PageScores& scores, const HeadTotals& totals, uint32_t i);

// Cuts `order` (best first) to the shortest prefix that reaches min_mass (0: no cut) and returns
// the mass covered.
float CutAtMass(const PageScores& scores, const HeadTotals& totals, float min_mass,
                std::vector<uint32_t>* order);

// log_mass of SelectedPage: the largest over the group.
float LargestLogMass(const PageScores& scores, uint32_t i);

// Keeps a logit finite: sums over rows near the largest float can overflow.
float SaturatedLogit(float x);

// Exact logits of the tokens of some pages.
class ExactPages {
 public:
  // Reads K of pages[i] for all queries. REQUIRES: every page is in memory.
  void Score(const SelectRequest& request, const PagedKv& kv, std::span<const PageId> pages);

  PageScores scores() const;
  uint32_t tokens_read() const { return tokens_read_; }
  const float* logits(uint32_t head, uint32_t i) const;  // [16], -inf beyond the fill

  // states += exact attention over pages[i] for every i with take[i] != 0. Reads their V.
  void AttendTo(const PagedKv& kv, std::span<const uint8_t> take, const AttentionStateRef& states);

 private:
  uint32_t group_ = 0;
  uint32_t tokens_read_ = 0;
  std::vector<PageId> pages_;
  std::vector<float> logits_;  // [group][pages * kPageTokens]
  std::vector<float> log_mass_, top_;
  std::vector<float> weights_;
};

}  // namespace icecache
