#include "kernels/sketch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/test_blocks.h"

namespace icecache {
namespace {

// Blocks of random deviations, with what their codes stand for beside them.
struct Sketches {
  Sketches(uint32_t page_count, uint32_t dims, float size, uint64_t seed)
      : bytes(page_count * SketchBytes(dims)) {
    const std::vector<float> all = RandomRows(page_count * kBlockRows, dims, seed);
    for (uint32_t p = 0; p < page_count; ++p) {
      std::vector<float> deltas(all.begin() + p * kBlockRows * dims,
                                all.begin() + (p + 1) * kBlockRows * dims);
      for (float& x : deltas) x *= size;
      uint8_t* block = bytes.data() + p * SketchBytes(dims);
      const float scale = PackSketch(deltas.data(), kBlockRows, dims, block);
      pages.push_back({block, scale, kBlockRows});
      for (const float x : deltas) {
        const float code = scale > 0 ? std::floor(x / (2 * scale)) : 0.0f;
        values.push_back(static_cast<int8_t>(2 * std::clamp(code, -8.0f, 7.0f) + 1));
        EXPECT_NEAR(scale * static_cast<float>(values.back()), x, 1.001f * scale);
      }
    }
  }
  std::vector<uint8_t> bytes;
  std::vector<SketchPage> pages;
  std::vector<int8_t> values;  // [page][token][dims] in units of the page's scale
};

TEST(Sketch, WeightsAreExponentialsOfTheirLogits) {
  constexpr uint32_t kDim = 32, kPages = 37;
  Sketches sketches(kPages, kDim, 0.25f, 9);
  std::vector<SketchPage>& pages = sketches.pages;
  for (uint32_t p = 0; p < kPages; ++p) pages[p].fill = 1 + p % kBlockRows;
  for (uint32_t group : {1u, 2u, 4u, 5u, 8u}) {
    SCOPED_TRACE(group);
    QuantizedQueries q;
    const std::vector<float> queries = RandomRows(group, kDim, group);
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
                                       q, g, &sketches.values[(p * kBlockRows + lane) * kDim]));
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
  Sketches sketches(kPages, kDim, 0.1f, 4);
  QuantizedQueries q;
  q.Assign(RandomRows(kGroup, kDim, 3).data(), kGroup, kDim, 1);
  std::vector<SketchPage>& pages = sketches.pages;
  for (uint32_t p = 0; p < kPages; ++p) pages[p].fill = p / 4 == 2 ? 0 : 16 - p % 3;
  const std::vector<float> centre = RandomRows(kGroup, kPages, 8);
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
  const Sketches sketches(kPages, kDim, 0.01f, 6);
  QuantizedQueries q;
  q.Assign(RandomRows(2, kDim, 5).data(), 2, kDim, 1);
  const std::vector<SketchPage>& pages = sketches.pages;
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
  const Sketches sketches(1, 32, 0.0f, 2);
  const SketchPage& page = sketches.pages[0];
  EXPECT_EQ(page.scale, 0.0f);
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
