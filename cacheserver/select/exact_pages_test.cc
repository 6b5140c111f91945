#include "cacheserver/select/exact_pages.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace icecache {
namespace {

// Two heads, three pages: head 0 has its mass on page 0, head 1 on page 2.
struct TwoHeads {
  std::vector<float> mass = {std::log(.8f), std::log(.1f), std::log(.1f),
                             std::log(2.f), std::log(4.f), std::log(14.f)};
  std::vector<float> top = {0.f, -1.f, -2.f, 0.f, 3.f, 1.f};
  PageScores scores{2, 3, 3, mass.data(), top.data()};
};

TEST(RankPages, SumsSharesOfMassOverTheHeads) {
  TwoHeads t;
  HeadTotals totals;
  totals.Assign(t.scores, nullptr);
  EXPECT_NEAR(totals.lse[0], 0.0f, 1e-5);
  EXPECT_NEAR(totals.lse[1], std::log(20.0f), 1e-5);
  std::vector<float> rank;
  RankPages(t.scores, totals, GroupRank::kMassSum, &rank);
  EXPECT_NEAR(rank[0], .9f, 1e-5);
  EXPECT_NEAR(rank[1], .3f, 1e-5);
  EXPECT_NEAR(rank[2], .8f, 1e-5);
  RankPages(t.scores, totals, GroupRank::kMassMax, &rank);
  EXPECT_NEAR(rank[1], .2f, 1e-5);
  RankPages(t.scores, totals, GroupRank::kMaxToken, &rank);
  EXPECT_NEAR(rank[1], 3 - std::log(20.0f), 1e-5);
}

TEST(RankPages, AHeadWhoseMassIsLocalCountsLess) {
  TwoHeads t;
  HeadTotals totals;
  const float local[2] = {std::log(9.0f), kEmptyMax};  // nine tenths of head 0 lie with the worker
  totals.Assign(t.scores, local);
  EXPECT_NEAR(totals.share[0], .1f, 1e-5);
  EXPECT_NEAR(totals.share[1], 1.0f, 1e-5);
  std::vector<float> rank;
  RankPages(t.scores, totals, GroupRank::kMassSum, &rank);
  EXPECT_NEAR(rank[0], .18f, 1e-5);
  EXPECT_GT(rank[2], rank[0]);
}

TEST(TopPages, AreSortedAndTiesGoToTheLowerPage) {
  const std::vector<float> rank = {1, 5, 5, 0, 7};
  std::vector<uint32_t> top;
  TopPages(rank, 3, &top);
  EXPECT_EQ(top, (std::vector<uint32_t>{4, 1, 2}));
  TopPages(rank, 99, &top);
  EXPECT_EQ(top, (std::vector<uint32_t>{4, 1, 2, 0, 3}));
  TopPages(rank, 0, &top);
  EXPECT_TRUE(top.empty());
}

TEST(CutAtMass, KeepsTheShortestSufficientPrefix) {
  TwoHeads t;
  HeadTotals totals;
  totals.Assign(t.scores, nullptr);
  std::vector<uint32_t> order = {0, 2, 1};
  EXPECT_NEAR(CutAtMass(t.scores, totals, 0.4f, &order), .45f, 1e-5);
  EXPECT_EQ(order, (std::vector<uint32_t>{0}));
  order = {0, 2, 1};
  EXPECT_NEAR(CutAtMass(t.scores, totals, 0.8f, &order), .85f, 1e-5);
  EXPECT_EQ(order.size(), 2u);
  order = {0, 2, 1};
  EXPECT_NEAR(CutAtMass(t.scores, totals, 0, &order), 1.0f, 1e-5);
  EXPECT_EQ(order.size(), 3u);
}

TEST(SaturatedLogit, IsAlwaysFinite) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float x : {inf, -inf, std::nanf(""), 3e38f})
    EXPECT_TRUE(std::isfinite(SaturatedLogit(x)));
  EXPECT_EQ(SaturatedLogit(-1234.5f), -1234.5f);
  EXPECT_LT(SaturatedLogit(std::nanf("")), SaturatedLogit(-1e30f));
}

}  // namespace
}  // namespace icecache
