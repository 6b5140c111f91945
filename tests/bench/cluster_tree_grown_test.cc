// A ClusterTree that has grown to twice its size covers what one built of all tokens covers, on the
// trace and under the bars of docs/index.md ("Growing"). Seeds are those on which pages that only
// took in what was near them, and never gave rows away, missed the bar.
#include <gtest/gtest.h>

#include "cacheserver/select/cluster_tree.h"
#include "tests/bench/select_truth.h"

namespace icecache {
namespace {

constexpr uint32_t kKeys = 8192, kQueries = 200, kPages = 12;

double Coverage(const SelectionPolicy& policy, const PageStore& store, const Trace& trace) {
  SelectTruth truth(trace);
  Selection got;
  double covered = 0;
  for (uint32_t q = 0; q < kQueries; ++q) {
    policy.Select({.queries = trace.Query(q),
                   .group = 1,
                   .max_pages = kPages,
                   .read_cap = 1024,
                   .rank = GroupRank::kMaxToken},
                  store.kv(), &got);
    truth.Assign(q, store);
    covered += truth.Coverage(0, 16, got.pages) / kQueries;
  }
  return covered;
}

class Grown : public testing::TestWithParam<uint64_t> {};

TEST_P(Grown, ToTwiceItsSizeCoversWhatAFreshBuildCovers) {
  const TraceSpec spec{.name = "clustered",
                       .keys = kKeys,
                       .extra_keys = kKeys,
                       .group = 1,
                       .query_count = kQueries,
                       .seed = GetParam()};
  const Trace trace = MakeTrace(spec).value();
  const auto build = [&](uint32_t tokens, PageStore* store) {
    auto policy = MakeClusterTree({trace.dtype, trace.dim, spec.seed});
    const TokenRows rows = trace.Rows(0, tokens);
    const BuildHints hints{.query_energy = trace.energy, .seed = spec.seed};
    EXPECT_TRUE(store->ApplyLayout(rows, policy->Build(rows, hints).value()).ok());
    return policy;
  };
  PageStore grown_store(trace.dtype, trace.dim), fresh_store(trace.dtype, trace.dim);
  const auto fresh = build(2 * kKeys, &fresh_store);
  const auto grown = build(kKeys, &grown_store);
  for (uint32_t t = 0; t < kKeys; ++t) {
    const TokenRows row = trace.Rows(kKeys + t, 1);
    const InsertPlan plan = grown->Insert(row, grown_store.kv()).value();
    ASSERT_TRUE(grown_store.ApplyInsert(plan, row).ok());
  }
  ASSERT_TRUE(grown->Validate(grown_store.kv()).ok());
  EXPECT_GE(Coverage(*grown, grown_store, trace), Coverage(*fresh, fresh_store, trace) - 0.02);
  EXPECT_GE(grown_store.token_count(), 0.85 * limits::kPageTokens * grown_store.page_count());
}

INSTANTIATE_TEST_SUITE_P(Seeds, Grown, testing::Values(21, 31));

}  // namespace
}  // namespace icecache
