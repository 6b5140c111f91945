// The truth that selections are judged by: exact logits of every indexed token, full attention, and
// what the best possible choices of tokens and pages would give.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "tests/bench/trace.h"
#include "tests/support/page_store.h"

namespace icecache {

// One group query against all indexed tokens of a store; reused from query to query.
class SelectTruth {
 public:
  explicit SelectTruth(const Trace& trace) : trace_(trace) {}

  // Takes the state of the store as it is now. Cost: exact attention.
  void Assign(uint32_t query, const PageStore& store);

  // Share of head h's exact top `count` tokens that lie in the pages.
  double Coverage(uint32_t h, uint32_t count, std::span<const SelectedPage> pages);
  // Share of head h's indexed mass in the pages.
  double Mass(uint32_t h, std::span<const SelectedPage> pages) const;
  // Head h's mass in `state`, as a share of the indexed mass; an estimate can pass 1.
  double ShareOf(uint32_t h, const AttentionStates& state) const;

  // Relative L2 error of head h's output (with what the worker holds) when the pages are exact and
  // the rest is `residual` (may be null: left out).
  double OutputError(uint32_t h, std::span<const SelectedPage> pages,
                     const AttentionStates* residual) const;
  // The same when head h's own best `tokens` tokens are exact and nothing else counts.
  double OracleError(uint32_t h, uint32_t tokens);
  // The same with the best `pages` pages of this layout by group-summed exact mass.
  std::vector<SelectedPage> OraclePages(uint32_t pages) const;
  // What an anchor layer would name (SelectRequest::near): the pages of four in five of the group's
  // heaviest `tokens` tokens.
  std::vector<PageId> NearPages(uint32_t tokens) const;

 private:
  // weights: [tokens] of head h, relative to its maximum.
  const float* Weights(uint32_t h) const { return weights_.data() + size_t{h} * stride_; }
  const uint32_t* TopTokens(uint32_t h, uint32_t count);
  double ErrorOf(uint32_t h, double denom, std::vector<double>* sum) const;
  void AddPage(uint32_t h, uint32_t page, double* denom, std::vector<double>* sum) const;
  void AddRow(uint32_t h, uint32_t token, double* denom, std::vector<double>* sum) const;

  const Trace& trace_;
  const PageStore* store_ = nullptr;
  uint32_t query_ = 0;
  size_t stride_ = 0;           // tokens
  std::vector<float> weights_;  // [group, tokens]: exp(logit - max)
  std::vector<float> max_;      // [group]
  std::vector<double> total_;   // [group]: sum of weights
  std::vector<double> full_;    // [group, dim]: full output
  std::vector<uint32_t> page_of_;
  std::vector<float> values_;  // [tokens, dim] in f32, kept while the trace's rows are the same
  std::vector<uint32_t> order_;
};

}  // namespace icecache
