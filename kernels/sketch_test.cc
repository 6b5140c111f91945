#include "kernels/sketch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/test_blocks.h"

namespace icecache {
namespace {

TEST(Sketch, WeightsAreExponentialsOfTheirLogits) {
  constexpr uint32_t kDim = 32, kPages = 37;
  const Blocks blocks(kPages, kDim, 9);
  std::vector<SketchPage> pages;
  for (uint32_t p = 0; p < kPages; ++p)
    pages.push_back({blocks.blocks[p], 0.002f, 1 + p % kBlockRows});
  for (uint32_t group : {1u, 2u, 4u, 5u, 8u}) {
    SCOPED_TRACE(group);
    QuantizedQueries q;
    const std::vector<float> queries = RandomQueries(group, kDim, group);
    q.Assign(queries.data(), group, kDim, 1);
    std::vector<float> centre(group * kPages), weights(group * kPages * kBlockRows),
        sum(group * kPages), top(sum);
    for (size_t i = 0; i < centre.size(); ++i) centre[i] = -0.3f * static_cast<float>(i % 300);
    SumSketchesWithTops(q, pages.data(), kPages, centre.data(), kPages, sum.data(), top.data());
    ScoreSketches(q, pages.data(), kPages, centre.data(), kPages, weights.data());
    for (uint32_t g = 0; g < group; ++g) {
      for (uint32_t p = 0; p < kPages; ++p) {
        double total = 0, best = 0;
        for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
          const size_t at = (size_t{g} * kPages + p) * kBlockRows + lane;
          const double logit = centre[g * kPages + p] +
                               double{q.step(g)} * pages[p].scale *
                                   static_cast<double>(IntegerDot(
                                       q, g, blocks.rows.data() + (p * kBlockRows + lane) * kDim));
          const double want = lane < pages[p].fill && logit > -87 ? std::exp(logit) : 0.0;
          EXPECT_NEAR(weights[at], want, 1e-5 * want + 1e-37);
          total += want;
          best = std::max(best, want);
        }
        EXPECT_NEAR(sum[g * kPages + p], total, 1e-5 * total + 1e-37);
        EXPECT_NEAR(top[g * kPages + p], best, 1e-5 * best + 1e-37);
      }
    }
  }
}

// Whatever the number of pages, the last few are not told apart from the others, and nothing is
// written beyond them.
TEST(Sketch, AnyNumberOfPagesGivesTheSameSums) {
  constexpr uint32_t kDim = 32, kPages = 23, kGroup = 5;
  const Blocks blocks(kPages, kDim, 4);
  QuantizedQueries q;
  q.Assign(RandomQueries(kGroup, kDim, 3).data(), kGroup, kDim, 1);
  std::vector<SketchPage> pages;
  for (uint32_t p = 0; p < kPages; ++p)
    pages.push_back({blocks.blocks[p], 0.001f, p / 4 == 2 ? 0 : 16 - p % 3});
  const std::vector<float> centre = RandomQueries(kGroup, kPages, 8);
  std::vector<float> all(kGroup * kPages), some;
  const std::vector<float> least(kGroup, -100.0f);
  SumSketches(q, pages.data(), kPages, centre.data(), least.data(), kPages, all.data());
  for (uint32_t g = 0; g < kGroup; ++g) {
    for (uint32_t p = 0; p < kPages; ++p) EXPECT_EQ(all[g * kPages + p] > 0, p / 4 != 2);
  }
  for (uint32_t count = 0; count < kPages; ++count) {
    some.assign(kGroup * kPages, -1.0f);
    SumSketches(q, pages.data(), count, centre.data(), least.data(), kPages, some.data());
    for (uint32_t g = 0; g < kGroup; ++g) {
      for (uint32_t p = 0; p < kPages; ++p)
        EXPECT_EQ(some[g * kPages + p], p < count ? all[g * kPages + p] : -1.0f) << count;
    }
  }
}

TEST(Sketch, PagesWithoutATokenOfWeightKeepTheirSumUpToABound) {
  constexpr uint32_t kDim = 32, kPages = 12;
  const Blocks blocks(kPages, kDim, 6);
  QuantizedQueries q;
  q.Assign(RandomQueries(2, kDim, 5).data(), 2, kDim, 1);
  std::vector<SketchPage> pages;
  for (uint32_t p = 0; p < kPages; ++p) pages.push_back({blocks.blocks[p], 0.0001f, 16});
  // Logits are within 1 of their centre; the first head's second four pages and the second head's
  // last four are light, one page of the third four is heavy for the first head.
  std::vector<float> centre(2 * kPages, 0.0f), sum(2 * kPages, 1e-3f), exact(sum), top(sum);
  std::fill_n(centre.begin() + 4, 7, -20.0f);
  std::fill_n(centre.begin() + kPages + 8, 4, -20.0f);
  sum[5] = 1e-9f;
  const float least[] = {-12.0f, -12.0f};
  SumSketchesWithTops(q, pages.data(), kPages, centre.data(), kPages, exact.data(), top.data());
  SumSketches(q, pages.data(), kPages, centre.data(), least, kPages, sum.data());
  const float bound = 16 * std::exp(-12.0f);
  for (uint32_t i = 0; i < 2 * kPages; ++i) {
    if (i == 5) {
      EXPECT_EQ(sum[i], 1e-9f);
    } else if ((i >= 4 && i < 8) || i >= kPages + 8) {
      EXPECT_NEAR(sum[i], bound, 1e-5f * bound);
    } else {
      EXPECT_EQ(sum[i], exact[i]) << i;
    }
  }
}

TEST(Sketch, ExponentIsCutWhereFloatsStillAdd) {
  const Blocks blocks(1, 32, 2);
  const SketchPage page{blocks.blocks[0], 0.0f, 16};
  QuantizedQueries q;
  const std::vector<float> query(32, 1.0f);
  q.Assign(query.data(), 1, 32, 1);
  const float centre = 1e30f;
  float sum, top;
  SumSketchesWithTops(q, &page, 1, &centre, 1, &sum, &top);
  EXPECT_TRUE(std::isfinite(sum));
  EXPECT_NEAR(std::log(top), kSketchExponentMax, 0.01f);
}

}  // namespace
}  // namespace icecache
