// Which runs of a chain are merged.
#include "cacheserver/context/merge_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr uint32_t kNoBound = 1u << 30;

// Sealed segments of one tenant, held by one context, oldest first.
std::vector<MergeLink> Links(const std::vector<uint32_t>& tokens) {
  std::vector<MergeLink> links;
  for (const uint32_t t : tokens) {
    links.push_back({.tenant = TenantId(1), .tokens = t, .holders = 1, .may_end = true});
  }
  return links;
}

std::optional<MergeRun> Plan(const std::vector<MergeLink>& links, uint32_t tokens_max = kNoBound) {
  return PlanMerge(links, tokens_max);
}

// Merges until nothing is left to do; adds up the tokens that were clustered anew.
std::vector<uint32_t> Settle(std::vector<uint32_t> tokens, uint64_t* work = nullptr) {
  while (const std::optional<MergeRun> run = Plan(Links(tokens))) {
    const auto begin = tokens.begin() + run->first, end = begin + run->count;
    uint32_t sum = 0;
    for (auto it = begin; it != end; ++it) sum += *it;
    if (work != nullptr) *work += sum;
    *begin = sum;
    tokens.erase(begin + 1, end);
  }
  return tokens;
}

TEST(MergePlan, EqualSegmentsBecomeOne) {
  for (const uint32_t count : {2u, 4u, 8u, 64u}) {
    EXPECT_EQ(Plan(Links(std::vector<uint32_t>(count, 1000))), (MergeRun{0, count}));
  }
}

TEST(MergePlan, AShortContinuationOfALongContextStaysByItself) {
  EXPECT_EQ(Plan(Links({32000})), std::nullopt);
  EXPECT_EQ(Plan(Links({32000, 8000})), std::nullopt);
  EXPECT_EQ(Plan(Links({32000, 8001})), (MergeRun{0, 2}));
  EXPECT_EQ(Plan(Links({32000, 100, 100, 100})), (MergeRun{1, 3}));
  EXPECT_EQ(Plan(Links({32000, 100, 100, 9000})), (MergeRun{0, 4}));
  EXPECT_EQ(Plan(Links({2960, 700, 135})), (MergeRun{0, 3}));  // together more than a quarter
}

TEST(MergePlan, SegmentsWithoutIndexedTokensJoinOneAnother) {
  EXPECT_EQ(Plan(Links({32000, 0})), std::nullopt);
  EXPECT_EQ(Plan(Links({32000, 0, 0, 0})), (MergeRun{1, 3}));
}

TEST(MergePlan, ARunIsOfOneTenant) {
  std::vector<MergeLink> links = Links({1000, 1000, 1000, 1000});
  links[0].tenant = links[1].tenant = TenantId(2);
  EXPECT_EQ(Plan(links), (MergeRun{2, 2}));
  links[2].tenant = TenantId(3);
  EXPECT_EQ(Plan(links), (MergeRun{0, 2}));
  links[1].tenant = TenantId(1);
  EXPECT_EQ(Plan(links), std::nullopt);
}

TEST(MergePlan, AMergedSegmentIsBounded) {
  EXPECT_EQ(Plan(Links({1000, 1000, 1000, 1000}), 2500), (MergeRun{2, 2}));
  EXPECT_EQ(Plan(Links({1000, 1000, 1000, 1000}), 1999), std::nullopt);
  EXPECT_EQ(Plan(Links({1000, 1000, 1000, 1000}), 0), std::nullopt);
}

TEST(MergePlan, WhatIsGrowingOrPostponedEndsNoRun) {
  std::vector<MergeLink> links = Links({1000, 1000, 1000});
  links[2].may_end = false;
  EXPECT_EQ(Plan(links), (MergeRun{0, 2}));
  links[1].may_end = false;
  EXPECT_EQ(Plan(links), std::nullopt);
}

// A parent that stays, with its own name, holds the first two of a child's chain.
TEST(MergePlan, WhatStaysWithOthersIsCopiedOnlyWithinABound) {
  std::vector<MergeLink> links = Links({1000, 1000, 1000, 1000});
  links[0].holders = links[1].holders = 2;
  EXPECT_EQ(Plan(links), (MergeRun{2, 2}));  // held by the child alone
  for (MergeLink& link : links) link.copied_max = 1000;
  EXPECT_EQ(Plan(links), (MergeRun{1, 3}));
  for (MergeLink& link : links) link.copied_max = 2000;
  EXPECT_EQ(Plan(links), (MergeRun{0, 4}));
  // Both hold the first two whole: nothing stays behind.
  EXPECT_EQ(Plan({links[0], links[1]}), (MergeRun{0, 2}));
}

// However a chain grows, it stays short, its newest part small, and the work within n log n.
TEST(MergePlan, ChainsStayShortAndTheWorkIsBounded) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 20; ++round) {
    const uint32_t most = 1 + random() % 2000;
    std::vector<uint32_t> chain;
    uint64_t work = 0, total = 0;
    for (int grown = 0; grown < 500; ++grown) {
      chain.push_back(1 + random() % most);
      total += chain.back();
      chain = Settle(chain, &work);
      uint64_t behind = 0;
      for (size_t i = chain.size(); i-- > 0;) {
        if (i + 1 < chain.size()) {
          EXPECT_GE(chain[i], limits::kMergeGrowth * behind);
        }
        behind += chain[i];
      }
      EXPECT_EQ(behind, total);
    }
    // Once as the newest, and then whenever its segment has grown by a quarter.
    const double times = 1 + std::log(static_cast<double>(total)) / std::log(1.25);
    EXPECT_LE(static_cast<double>(work), static_cast<double>(total) * times);
    EXPECT_LE(chain.size(), 2 + std::log(static_cast<double>(total)) / std::log(5.0));
  }
}

}  // namespace
}  // namespace icecache
