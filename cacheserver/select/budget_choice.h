// What a policy does once it has ranked pages or tokens: keep to the budget, read, answer.
//
// Budgets. A policy of pages returns at most max_pages of them. A policy of tokens may choose 16 *
// max_pages tokens, wherever they lie; it has two ways to answer:
//   residual asked    exactly these tokens are attended to where they are and come back as the
//                     residual; no pages. This is the published algorithm at its own granularity,
//                     and tokens_read counts every token.
//   residual refused  the max_pages pages that hold most of what the tokens rank for. This is what
//                     a service that ships pages gets from the same scores.
// Neither reads K or V of anything else, so read_cap is of no use to them. In a chain of segments
// each segment's tokens are a budget of their own; pages share one (cacheserver/context).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cacheserver/select/exact_pages.h"
#include "cacheserver/select/selection_policy.h"

namespace icecache {

// Slots: 16 * page + row. All vectors over slots have 16 * page_count elements.

// logits[group][slots] of every token in memory; -inf where there is none. For oracles, whose
// search is not counted in tokens_read.
void ScoreAllTokens(const SelectRequest& request, const PagedKv& kv, std::vector<float>* logits);

// rank[unit] >= 0 from estimated logits[group][count] of units (tokens, clusters) by the request's
// rule, or `by`: the summed (or largest) softmax weight of the heads.
void RankUnits(const SelectRequest& request, GroupRank by, std::span<const float> log_mass,
               std::vector<float>* rank);

// The best pages by estimate, and nothing else. Their log_mass is exact where they are in memory.
void ChoosePages(const PageScores& estimate, const SelectRequest& request, const PagedKv& kv,
                 Selection* out);

// The best tokens by rank[slots]; one with a negative rank is never chosen. weight[slots] (empty:
// rank) says for how much of the mass each stands: covered_mass, min_mass and the pages of the
// second answer go by it. chosen (null: not wanted) gets the slots that were read, ascending.
void ChooseTokens(std::span<const float> rank, std::span<const float> weight,
                  const SelectRequest& request, const PagedKv& kv, Selection* out,
                  std::vector<uint32_t>* chosen = nullptr);

// Residual += exact attention over the tokens in `slots` (ascending, all in memory). offsets
// [group][slots.size()] (empty: none) is added to the logits; -inf leaves a token out for a head.
class TokenReader {
 public:
  // Reads K: logits[group][slots.size()].
  void Read(const SelectRequest& request, const PagedKv& kv, std::span<const uint32_t> slots);
  float* logits(uint32_t head) { return logits_.data() + head * slots_.size(); }
  // Reads V.
  void AttendTo(const PagedKv& kv, const AttentionStateRef& states);

 private:
  std::vector<uint32_t> slots_;
  std::vector<float> logits_, weights_;
};

}  // namespace icecache
