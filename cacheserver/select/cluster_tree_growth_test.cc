// ClusterTree while it grows and is cut back, and on rows at the edge of what floats can hold.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/cluster_tree_slice.h"

namespace icecache {
namespace {

TEST(ClusterTree, GrowsFromNothingAndStaysAccurate) {
  Slice slice(128);
  ASSERT_TRUE(slice.Build().ok());
  const std::vector<float> queries = slice.Queries(4);
  EXPECT_TRUE(Ask(slice.policy(), slice.store().kv(), queries, 4, 100).pages.empty());
  for (uint32_t step : {1u, 1u, 3u, 20u, 100u, 475u, 1400u}) {
    slice.Draw(step);
    ASSERT_TRUE(slice.InsertAll().ok());
    const Status valid = slice.Validate();
    ASSERT_TRUE(valid.ok()) << valid.ToString();
    EXPECT_LT(ErrorOf(slice.store().kv(), queries,
                      Ask(slice.policy(), slice.store().kv(), queries, 8, 256))
                  .output,
              0.1);
  }
  EXPECT_GE(slice.Counter("page_fill"), 0.8);
}

TEST(ClusterTree, GrowthKeepsFillAndSplitsSupers) {
  Slice slice(64);
  slice.Draw(4000);
  ASSERT_TRUE(slice.Build().ok());
  const double before = slice.Counter("supers");
  slice.Draw(12000);
  ASSERT_TRUE(slice.InsertAll().ok());
  ASSERT_TRUE(slice.Validate().ok()) << slice.Validate().ToString();
  EXPECT_GT(slice.Counter("supers"), before);
  EXPECT_GE(slice.Counter("page_fill"), 0.85);
  EXPECT_EQ(slice.store().token_count(), 16000u);
}

TEST(ClusterTree, RandomGrowthAndForgettingKeepTheInvariants) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Slice slice(64, {}, seed % 2 == 0 ? DType::kF32 : DType::kBF16, seed);
    slice.Draw(seed % 3 == 0 ? 0 : 700);
    ASSERT_TRUE(slice.Build().ok());
    for (int step = 0; step < 12; ++step) {
      if (slice.rng()() % 3 != 0) {
        slice.Draw(slice.rng()() % 200);
        ASSERT_TRUE(slice.InsertAll().ok());
      } else {
        std::vector<uint16_t> masks(slice.store().page_count());
        for (uint16_t& m : masks)
          m = slice.rng()() % 4 == 0 ? static_cast<uint16_t>(slice.rng()()) : 0xffff;
        if (slice.rng()() % 6 == 0) std::fill(masks.begin(), masks.end(), uint16_t{0});
        for (uint32_t p = 0; p < masks.size(); ++p)
          masks[p] &= static_cast<uint16_t>((1u << slice.store().kv().pages[p].fill) - 1);
        ASSERT_TRUE(slice.policy().Retain(masks, slice.store().kv()).ok());
        ASSERT_TRUE(slice.store().ApplyRetain(masks).ok());
      }
      const Status valid = slice.Validate();
      ASSERT_TRUE(valid.ok()) << valid.ToString();
      const std::vector<float> queries = slice.Queries(2);
      const Selection got = Ask(slice.policy(), slice.store().kv(), queries, 6, 100000);
      if (slice.store().page_count() > 0) {
        EXPECT_LT(ErrorOf(slice.store().kv(), queries, got).output, 1e-3);
      }
    }
  }
}

TEST(ClusterTree, RetainRefusesToCutAColdPageAndChangesNothing) {
  Slice slice(64);
  slice.Draw(100);
  ASSERT_TRUE(slice.Build().ok());
  std::string before, after;
  slice.policy().Save(&before);
  const PagedKv warm = slice.store().kv();
  std::vector<PageView> views(warm.pages, warm.pages + warm.page_count);
  views[2].k = nullptr;
  PagedKv kv = warm;
  kv.pages = views.data();
  std::vector<uint16_t> masks(warm.page_count, 0xffff);
  masks[0] = 0;
  masks[2] = 1;
  EXPECT_EQ(slice.policy().Retain(masks, kv).code(), StatusCode::kFailedPrecondition);
  slice.policy().Save(&after);
  EXPECT_EQ(before, after);
}

TEST(ClusterTree, InsertGoesOnlyToPagesInMemory) {
  Slice slice(64);
  slice.Draw(640);
  ASSERT_TRUE(slice.Build().ok());
  const PagedKv warm = slice.store().kv();
  std::vector<PageView> views(warm.pages, warm.pages + warm.page_count);
  for (PageView& view : views) view.k = view.v = nullptr;
  PagedKv cold = warm;
  cold.pages = views.data();
  slice.Draw(1);
  const auto plan = slice.policy().Insert(slice.rows(), cold);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->page.value, warm.page_count);
  EXPECT_FALSE(plan->move.has_value());
  ASSERT_TRUE(slice.store().ApplyInsert(*plan, slice.rows()).ok());
  EXPECT_TRUE(slice.Validate().ok());
}

TEST(ClusterTree, RefusesValuesThatAreNotFiniteAndChangesNothing) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Slice slice(64);
    slice.Draw(50);
    ASSERT_TRUE(slice.Build().ok());
    std::string before, after;
    slice.policy().Save(&before);
    slice.Push([&](uint32_t j) { return j == 11 ? bad : 0.0f; });
    const auto plan = slice.policy().Insert(slice.rows(), slice.store().kv());
    EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
    slice.policy().Save(&after);
    EXPECT_EQ(before, after);
    Slice other(64);
    other.Draw(5);
    other.Push([&](uint32_t j) { return j == 63 ? bad : 1.0f; });
    EXPECT_EQ(other.Build().code(), StatusCode::kInvalidArgument);
  }
}

TEST(ClusterTree, HugeZeroAndIdenticalRowsAreFine) {
  for (float magnitude : {0.0f, 1.0f, 1e15f, 1e30f}) {
    for (float noise : {0.0f, 1.0f}) {
      SCOPED_TRACE(testing::Message() << magnitude << " noise " << noise);
      Slice slice(64, {}, DType::kF32);
      std::normal_distribution<float> normal;
      const auto draw = [&](uint32_t count) {
        for (uint32_t t = 0; t < count; ++t)
          slice.Push([&](uint32_t j) {
            return magnitude * (1.0f + noise * normal(slice.rng()) + static_cast<float>(j % 3));
          });
      };
      draw(300);
      ASSERT_TRUE(slice.Build().ok());
      draw(100);
      ASSERT_TRUE(slice.InsertAll().ok());
      ASSERT_TRUE(slice.Validate().ok()) << slice.Validate().ToString();
      for (uint32_t cap : {0u, 100u, 400u}) {
        const Selection got = Ask(slice.policy(), slice.store().kv(), slice.Queries(3), 4, cap);
        EXPECT_EQ(got.pages.size(), 4u);
        for (const SelectedPage& page : got.pages) EXPECT_FALSE(std::isnan(page.log_mass));
        for (float x : got.residual.flat()) EXPECT_FALSE(std::isnan(x));
      }
    }
  }
}

TEST(ClusterTree, ImagesRoundTripAndCorruptionIsFound) {
  Slice slice(64, {.sketch = Sketch::kOn});
  slice.Draw(900);
  ASSERT_TRUE(slice.Build().ok());
  slice.Draw(200);
  ASSERT_TRUE(slice.InsertAll().ok());
  std::string image, again;
  slice.policy().Save(&image);
  const auto copy = slice.Make();
  ASSERT_TRUE(copy->Restore(image).ok());
  copy->Save(&again);
  EXPECT_EQ(image, again);
  const std::vector<float> queries = slice.Queries(4);
  const Selection a = Ask(slice.policy(), slice.store().kv(), queries, 6, 200);
  const Selection b = Ask(*copy, slice.store().kv(), queries, 6, 200);
  EXPECT_TRUE(
      std::equal(a.residual.flat().begin(), a.residual.flat().end(), b.residual.flat().begin()));
  for (size_t at = 0; at < image.size(); at += 997) {
    std::string bad = image;
    bad[at] = static_cast<char>(bad[at] ^ 0x40);
    EXPECT_EQ(copy->Restore(bad).code(), StatusCode::kDataLoss) << at;
    EXPECT_EQ(copy->Restore(image.substr(0, at)).code(), StatusCode::kDataLoss) << at;
  }
  copy->Save(&again);
}

TEST(ClusterTree, EqualInputGivesEqualImages) {
  std::string images[2];
  for (std::string& image : images) {
    Slice slice(96);
    slice.Draw(3000);
    ASSERT_TRUE(slice.Build().ok());
    slice.Draw(500);
    ASSERT_TRUE(slice.InsertAll().ok());
    slice.policy().Save(&image);
  }
  EXPECT_EQ(images[0], images[1]);
}

TEST(ClusterTree, AMillionTokensAreIndexedWhole) {
#ifdef __SANITIZE_THREAD__
  // This test has one thread: as many tokens as make two parts and two levels show all there is.
  constexpr uint32_t kTokens = 1u << 18;
#else
  constexpr uint32_t kTokens = 1u << 20;
#endif
  Slice slice(32);
  slice.DrawMany(kTokens);
  ASSERT_TRUE(slice.Build().ok());
  const Status valid = slice.Validate();
  ASSERT_TRUE(valid.ok()) << valid.ToString();
  EXPECT_EQ(slice.Counter("tokens"), kTokens);
  EXPECT_GE(slice.Counter("page_fill"), 0.95);
  const std::vector<float> queries = slice.Queries(2, 2.0f);
  const Selection got = Ask(slice.policy(), slice.store().kv(), queries, 12, 1024);
  EXPECT_EQ(got.pages.size(), 12u);
  EXPECT_LE(got.tokens_read, RowsOf(got, slice.store().kv()) + 1024u);
  const Error error = ErrorOf(slice.store().kv(), queries, got, MakeCpuAttention());
  EXPECT_LT(error.output, 0.1);
  EXPECT_LT(error.log_mass, 0.1);
}

}  // namespace
}  // namespace icecache
