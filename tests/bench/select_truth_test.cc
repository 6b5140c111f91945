// The bench's judge is judged here: on pages whose errors are known, and against the float64
// reference.
#include "tests/bench/select_truth.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/bench/measure.h"

namespace icecache {
namespace {

struct Judged {
  explicit Judged(const std::string& name)
      : trace(MakeTrace({.name = name, .keys = 1500, .query_count = 3, .seed = 3}).value()),
        store(trace.dtype, trace.dim),
        policy(MakePolicy(PolicyKind::kExact, {trace.dtype, trace.dim, 1})),
        truth(trace) {
    const TokenRows rows = trace.Rows(0, trace.keys);
    EXPECT_TRUE(store.ApplyLayout(rows, policy->Build(rows, {}).value()).ok());
  }
  Selection Select(uint32_t query, uint32_t max_pages) {
    Selection got;
    policy->Select({.queries = trace.Query(query), .group = trace.group, .max_pages = max_pages},
                   store.kv(), &got);
    truth.Assign(query, store);
    return got;
  }

  Trace trace;
  PageStore store;
  std::unique_ptr<SelectionPolicy> policy;
  SelectTruth truth;
};

TEST(SelectTruth, AllPagesAreFullCoverageAndNoError) {
  for (const char* name : {"clustered", "calibrated:topic"}) {
    Judged judged(name);
    const Selection got = judged.Select(1, 1000);
    for (uint32_t h = 0; h < judged.trace.group; ++h) {
      EXPECT_EQ(judged.truth.Coverage(h, 16, got.pages), 1.0);
      EXPECT_NEAR(judged.truth.Mass(h, got.pages), 1.0, 1e-5);
      EXPECT_LT(judged.truth.OutputError(h, got.pages, nullptr), 1e-5);
      EXPECT_LT(judged.truth.OracleError(h, judged.trace.keys), 1e-5);
    }
  }
}

TEST(SelectTruth, TheOraclesResidualClosesTheGapAndItsAbsenceIsSeen) {
  for (const char* name : {"calibrated:broad", "calibrated:diffuse"}) {
    Judged judged(name);
    const Selection got = judged.Select(0, 4);
    for (uint32_t h = 0; h < judged.trace.group; ++h) {
      EXPECT_LT(judged.truth.OutputError(h, got.pages, &got.residual), 1e-4) << name;
      EXPECT_GT(judged.truth.OutputError(h, got.pages, nullptr), 1e-2) << name;
    }
  }
}

TEST(SelectTruth, TokenOracleIsAtLeastAsGoodAsPageOracleInCoverage) {
  Judged judged("calibrated:topic");
  judged.truth.Assign(2, judged.store);
  const std::vector<SelectedPage> best = judged.truth.OraclePages(12);
  ASSERT_EQ(best.size(), 12u);
  const Selection got = judged.Select(2, 12);
  // The exact policy ranks by the same masses, so it finds the same pages.
  for (size_t i = 0; i < best.size(); ++i) EXPECT_EQ(best[i].page, got.pages[i].page);
}

TEST(SelectTruth, OracleErrorFallsAsItReadsMore) {
  Judged judged("calibrated:broad");
  judged.truth.Assign(0, judged.store);
  for (uint32_t h = 0; h < judged.trace.group; ++h)
    EXPECT_LT(judged.truth.OracleError(h, 1200), judged.truth.OracleError(h, 16));
}

TEST(Quantiles, AreNearestRank) {
  EXPECT_EQ(Quantile({5, 1, 3, 2, 4}, 0.5), 3);
  EXPECT_EQ(Quantile({5, 1, 3, 2, 4}, 1.0), 5);
  EXPECT_EQ(Quantile({5, 1, 3, 2, 4}, 0.0), 1);
  EXPECT_EQ(Quantile({}, 0.5), 0);
  EXPECT_EQ(Mean({1, 2, 6}), 3);
}

}  // namespace
}  // namespace icecache
