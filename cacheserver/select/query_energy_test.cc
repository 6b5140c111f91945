#include "cacheserver/select/query_energy.h"

#include <gtest/gtest.h>

namespace icecache {
namespace {

constexpr uint32_t kDim = 4, kMemory = 16;

void Observe(QueryEnergy* energy, float a, float b, int times) {
  const std::vector<float> queries = {a, b, 0, 1, -a, -b, 0, 1};  // a group of two
  for (int i = 0; i < times; ++i) energy->Observe(queries.data(), 2, kDim);
}

TEST(QueryEnergy, IsTheMeanSquareOfWhatWasSeen) {
  QueryEnergy energy(kMemory);
  Observe(&energy, 1, 3, 4);
  Observe(&energy, 3, 1, 4);
  ASSERT_EQ(energy.value().size(), kDim);
  EXPECT_NEAR(energy.value()[0], 5, 1e-5);
  EXPECT_NEAR(energy.value()[1], 5, 1e-5);
  EXPECT_EQ(energy.value()[2], 0);
  EXPECT_NEAR(energy.value()[3], 1, 1e-5);
}

TEST(QueryEnergy, AFewQueriesAreNotEnough) {
  QueryEnergy energy(kMemory);
  EXPECT_TRUE(energy.value().empty());
  Observe(&energy, 1, 1, 1);
  EXPECT_TRUE(energy.value().empty());
  Observe(&energy, 1, 1, 1);
  EXPECT_FALSE(energy.value().empty());
}

TEST(QueryEnergy, ForgetsWhatIsLongAgo) {
  QueryEnergy energy(kMemory);
  energy.Assign(std::vector<float>{100, 0, 0, 0});
  EXPECT_EQ(energy.value()[0], 100);
  Observe(&energy, 1, 2, 5 * kMemory);
  EXPECT_NEAR(energy.value()[0], 1, 1);
  EXPECT_NEAR(energy.value()[1], 4, 0.1);
  energy.Assign({});
  EXPECT_TRUE(energy.value().empty());
}

}  // namespace
}  // namespace icecache
