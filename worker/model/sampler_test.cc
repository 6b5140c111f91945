#include "worker/model/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace icecache {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Sampler, GreedyTakesTheLargestAndTheFirstAmongEquals) {
  Sampler greedy({});
  EXPECT_EQ(greedy.Sample(std::vector<float>{-3, 5, 2, 5}), 1);
  EXPECT_EQ(greedy.Sample(std::vector<float>{7}), 0);
  EXPECT_EQ(greedy.Sample(std::vector<float>{kNan, -kInf, -9, kNan}), 2);
}

std::vector<double> Frequencies(const SamplerOptions& options, const std::vector<float>& logits,
                                int draws) {
  Sampler sampler(options);
  std::vector<double> counts(logits.size());
  for (int i = 0; i < draws; ++i)
    counts[static_cast<size_t>(sampler.Sample(logits))] += 1.0 / draws;
  return counts;
}

TEST(Sampler, DrawsFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits = {std::log(1.0f), std::log(4.0f), std::log(16.0f)};
  const auto plain = Frequencies({.temperature = 1, .seed = 5}, logits, 40000);
  EXPECT_NEAR(plain[0], 1.0 / 21, 0.01);
  EXPECT_NEAR(plain[1], 4.0 / 21, 0.01);
  const auto hot =
      Frequencies({.temperature = 2, .seed = 5}, logits, 40000);  // square roots: 1, 2, 4
  EXPECT_NEAR(hot[0], 1.0 / 7, 0.01);
  EXPECT_NEAR(hot[2], 4.0 / 7, 0.01);
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.15f),
                                     std::log(0.25f)};
  const auto kept = Frequencies({.temperature = 1, .top_p = 0.7, .seed = 1}, logits, 20000);
  EXPECT_EQ(kept[0], 0);
  EXPECT_EQ(kept[2], 0);
  EXPECT_NEAR(kept[1], 2.0 / 3, 0.02);
  EXPECT_NEAR(kept[3], 1.0 / 3, 0.02);
  const auto one = Frequencies({.temperature = 1, .top_p = 1e-9, .seed = 1}, logits, 100);
  EXPECT_NEAR(one[1], 1, 1e-9);
}

TEST(Sampler, SameSeedSameTokensOtherSeedOthers) {
  const std::vector<float> logits(50, 0.0f);
  const auto draw = [&](uint64_t seed) {
    Sampler sampler({.temperature = 0.8, .top_p = 0.9, .seed = seed});
    std::vector<int32_t> tokens;
    for (int i = 0; i < 30; ++i) tokens.push_back(sampler.Sample(logits));
    return tokens;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
}

// Written down once: a change here changes what every seed generates.
TEST(Sampler, TheSequenceOfASeedIsFixed) {
  const std::vector<float> logits(1000, 0.0f);
  Sampler sampler({.temperature = 1, .seed = 42});
  // SplitMix64 of seed 42 begins bdd732262feb6e95, 28efe333b266f103, 47526757130f9f52.
  EXPECT_EQ(sampler.Sample(logits), static_cast<int32_t>(1000 * (0xbdd732262feb6e95ull / 0x1p64)));
  EXPECT_EQ(sampler.Sample(logits), static_cast<int32_t>(1000 * (0x28efe333b266f103ull / 0x1p64)));
  EXPECT_EQ(sampler.Sample(logits), static_cast<int32_t>(1000 * (0x47526757130f9f52ull / 0x1p64)));
}

TEST(Sampler, StrangeLogitsStillGiveAToken) {
  Sampler sampler({.temperature = 1, .seed = 1});
  EXPECT_EQ(sampler.Sample(std::vector<float>{-kInf, 3, -kInf}), 1);
  EXPECT_EQ(sampler.Sample(std::vector<float>{0, kInf, kNan}), 1);
  EXPECT_EQ(sampler.Sample(std::vector<float>{kNan, 1, kNan}), 1);
  const int32_t token = sampler.Sample(std::vector<float>{kNan, kNan});
  EXPECT_TRUE(token == 0 || token == 1);
}

TEST(SamplerOptions, EachBadValueIsNamed) {
  EXPECT_TRUE(SamplerOptions{}.Validate().ok());
  for (const double bad : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT((SamplerOptions{.temperature = bad}).Validate().message(),
                ::testing::HasSubstr("temperature"));
  }
  for (const double bad : {0.0, 1.01, -0.5, std::nan("")}) {
    EXPECT_THAT((SamplerOptions{.top_p = bad}).Validate().message(), ::testing::HasSubstr("top-p"));
  }
}

}  // namespace
}  // namespace icecache
