#include "kernels/page_mass.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace icecache {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// A table of seven blocks, of which some are scanned out of order; every fifth slot is empty.
struct Table {
  Table() : spread(7 * 16), log_count(7 * 16), centre(blocks.size() * 16) {
    std::mt19937_64 rng(5);
    std::uniform_real_distribution<float> uniform(0, 4);
    for (float& x : spread) x = uniform(rng);
    for (size_t i = 0; i < log_count.size(); ++i) log_count[i] = i % 5 == 0 ? kNone : uniform(rng);
    for (float& x : centre) x = 5 * uniform(rng) - 10;
  }
  size_t SlotOf(size_t i) const { return size_t{blocks[i / 16]} * 16 + i % 16; }
  const std::vector<uint32_t> blocks{4, 0, 6};
  std::vector<float> spread, log_count, centre;
};

TEST(PageMass, LogMassesAreCentresAndGainsAndCounts) {
  Table t;
  t.centre[1] = std::numeric_limits<float>::infinity();
  t.centre[2] = -3e38f;
  std::vector<float> centre = t.centre, mass(centre.size());
  const float top = EstimateLogMasses(t.blocks.data(), t.blocks.size(), t.spread.data(),
                                      t.log_count.data(), 1.5f, centre.data(), mass.data());
  float best = kNone;
  for (size_t i = 0; i < mass.size(); ++i) {
    const double s = 1.5 * t.spread[t.SlotOf(i)];
    const double c = std::min(std::max(double{t.centre[i]}, -1e30), 1e30);
    const double expected = c + 0.5 * s * s / (1 + 0.2 * s) + t.log_count[t.SlotOf(i)];
    if (std::isinf(expected)) {
      EXPECT_EQ(mass[i], kNone);
    } else {
      EXPECT_NEAR(mass[i], expected, 1e-5 * (1 + std::fabs(expected))) << i;
    }
    EXPECT_LE(std::fabs(centre[i]), 1e30f);
    best = std::max(best, mass[i]);
  }
  EXPECT_EQ(top, best);
}

TEST(PageMass, SpreadGainsAreAddedAndLimited) {
  const Table t;
  std::vector<float> centre = t.centre;
  centre[3] = 2e30f;
  AddSpreadGains(t.spread.data(), centre.size(), 0.7f, -3.0f, centre.data());
  for (size_t i = 0; i < centre.size(); ++i) {
    const double s = 0.7 * t.spread[i];
    const double want = i == 3 ? 1e30 : t.centre[i] + 0.5 * s * s / (1 + 0.2 * s) - 3;
    EXPECT_NEAR(centre[i], want, 1e-5 * (1 + std::fabs(want))) << i;
  }
}

TEST(PageMass, TopsReachAboveTheCentreAndEmptySlotsHaveNone) {
  const Table t;
  std::vector<float> top(t.centre.size());
  EstimateTops(t.blocks.data(), t.blocks.size(), t.spread.data(), t.log_count.data(), 1.25f, -2.0f,
               t.centre.data(), top.data());
  for (size_t i = 0; i < top.size(); ++i) {
    const size_t slot = t.SlotOf(i);
    if (t.log_count[slot] == kNone) {
      EXPECT_EQ(top[i], kNone);
    } else {
      EXPECT_NEAR(top[i], t.centre[i] + 1.25f * t.spread[slot] - 2.0f, 1e-5) << i;
    }
  }
}

TEST(PageMass, HeadsAreJoinedBySumOrMaximum) {
  const Table t;
  const std::vector<float>& x = t.centre;
  std::vector<float> max(x.size(), 99.0f), sum(x.size(), 99.0f);
  MaxScaled(x.data(), x.size(), 2.0f, true, max.data());
  MaxScaled(x.data(), x.size(), -1.0f, false, max.data());
  AddScaled(x.data(), x.size(), 2.0f, true, sum.data());
  AddScaled(x.data(), x.size(), 0.5f, false, sum.data());
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(max[i], std::max(2 * x[i], -x[i]));
    EXPECT_NEAR(sum[i], 2.5f * x[i], 1e-4);
  }
}

TEST(PageMass, BlocksAreSummedAndGroupsKeepTheLargestOfEachLane) {
  std::vector<float> x(5 * 16), sums(5), top(3 * 16);
  std::mt19937_64 rng(6);
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(rng);
  SumBlocks(x.data(), 5, sums.data());
  MaxOfBlockGroups(x.data(), 5, 2, top.data());
  for (size_t b = 0; b < 5; ++b) {
    double sum = 0;
    for (size_t lane = 0; lane < 16; ++lane) sum += x[b * 16 + lane];
    EXPECT_NEAR(sums[b], sum, 1e-5);
  }
  for (size_t i = 0; i < top.size(); ++i) {
    const size_t at = i / 16 * 32 + i % 16;
    EXPECT_EQ(top[i], at + 16 < x.size() ? std::max(x[at], x[at + 16]) : x[at]);
  }
}

}  // namespace
}  // namespace icecache
