#include "kernels/nearest.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/test_blocks.h"

namespace icecache {
namespace {

double Distance(const float* a, const float* b, uint32_t dim) {
  double sum = 0;
  for (uint32_t j = 0; j < dim; ++j) sum += (double{a[j]} - b[j]) * (double{a[j]} - b[j]);
  return sum;
}

TEST(Nearest, FindsTheNearestCentroid) {
  for (uint32_t dim : {16u, 48u, 128u}) {
    for (uint32_t count : {1u, 2u, 15u, 16u, 17u, 33u, 100u}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << " count " << count);
      const std::vector<float> centroids = RandomRows(count, dim, count);
      const std::vector<float> rows = RandomRows(25, dim, dim);
      CentroidPanels panels;
      panels.Assign(centroids.data(), count, dim);
      std::vector<uint32_t> best(25);
      std::vector<float> score(25);
      Nearest(panels, {rows.data(), dim}, 25, best.data(), score.data());
      for (uint32_t r = 0; r < 25; ++r) {
        const float* x = rows.data() + size_t{r} * dim;
        ASSERT_LT(best[r], count);
        const double found = Distance(x, centroids.data() + size_t{best[r]} * dim, dim);
        const std::vector<float> origin(dim, 0.0f);
        EXPECT_NEAR(found, Distance(x, origin.data(), dim) - 2 * double{score[r]}, 1e-3);
        for (uint32_t c = 0; c < count; ++c) {
          EXPECT_LE(found, Distance(x, centroids.data() + size_t{c} * dim, dim) + 1e-3);
        }
      }
    }
  }
}

TEST(Nearest, TiesGoToTheLowestIndex) {
  const std::vector<float> one = RandomRows(1, 16, 4);
  std::vector<float> centroids;
  for (int i = 0; i < 40; ++i) centroids.insert(centroids.end(), one.begin(), one.end());
  CentroidPanels panels;
  panels.Assign(centroids.data(), 40, 16);
  const std::vector<float> rows = RandomRows(9, 16, 5);
  std::vector<uint32_t> best(9, 99);
  Nearest(panels, {rows.data(), 16}, 9, best.data(), nullptr);
  EXPECT_EQ(best, std::vector<uint32_t>(9, 0));
}

TEST(Nearest, PanelsAreReusableForFewerCentroids) {
  CentroidPanels panels;
  const std::vector<float> many = RandomRows(50, 32, 6);
  panels.Assign(many.data(), 50, 32);
  panels.Assign(many.data(), 2, 32);
  std::vector<uint32_t> best(2);
  Nearest(panels, {many.data(), 32}, 2, best.data(), nullptr);
  EXPECT_EQ(best, (std::vector<uint32_t>{0, 1}));
}

TEST(Nearest, RowsCanBeChosenByIndex) {
  const std::vector<float> centroids = RandomRows(20, 32, 7), rows = RandomRows(30, 32, 8);
  const std::vector<uint32_t> ids = {29, 0, 7, 7, 13, 2, 21, 5};
  CentroidPanels panels;
  panels.Assign(centroids.data(), 20, 32);
  std::vector<uint32_t> all(30), some(ids.size());
  Nearest(panels, {rows.data(), 32}, 30, all.data(), nullptr);
  Nearest(panels, {rows.data(), 32, ids.data()}, ids.size(), some.data(), nullptr);
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(some[i], all[ids[i]]);
}

TEST(Nearest, SumsFollowTheTable) {
  const std::vector<float> rows = RandomRows(11, 80, 10);
  const std::vector<uint32_t> ids = {10, 3, 3, 0}, into = {1, 0, 1, 2};
  std::vector<float> sums(3 * 80, 1.0f);
  AddRowsByIndex({rows.data(), 80, ids.data()}, 4, 80, into.data(), sums.data());
  for (uint32_t j = 0; j < 80; ++j) {
    EXPECT_NEAR(sums[j], 1 + rows[3 * 80 + j], 1e-5);
    EXPECT_NEAR(sums[80 + j], 1 + rows[10 * 80 + j] + rows[3 * 80 + j], 1e-5);
    EXPECT_NEAR(sums[160 + j], 1 + rows[j], 1e-5);
  }
}

}  // namespace
}  // namespace icecache
