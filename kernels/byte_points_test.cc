#include "kernels/byte_points.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "hwy/targets.h"
#include "kernels/distance.h"
#include "kernels/packing.h"
#include "kernels/test_blocks.h"

namespace icecache {
namespace {

// Points of rows[count, dim], and what they are as bytes.
struct Encoded {
  Encoded(const std::vector<float>& rows, uint32_t dim_of_rows)
      : dim(dim_of_rows), bytes(rows.size()), scale(rows.size() / dim), x(rows.size()) {
    for (size_t i = 0; i < scale.size(); ++i)
      scale[i] = EncodePoint(rows.data() + i * dim, dim, bytes.data() + i * dim);
    for (size_t i = 0; i < scale.size(); ++i) DecodePoint(table(), i, x.data() + i * dim);
  }
  BytePoints table(const std::vector<uint32_t>& ids = {}) const {
    return {bytes.data(), scale.data(), dim, ids.empty() ? nullptr : ids.data()};
  }
  const float* row(size_t i) const { return x.data() + i * dim; }

  uint32_t dim;
  std::vector<uint8_t> bytes;
  std::vector<float> scale, x;
};

double Distance(const float* a, const float* b, uint32_t dim) {
  double sum = 0;
  for (uint32_t j = 0; j < dim; ++j) sum += (double{a[j]} - b[j]) * (double{a[j]} - b[j]);
  return sum;
}

// Centroids with a largest element of 63 and no fractions, which seven bits hold exactly.
std::vector<float> WholeCentroids(uint32_t count, uint32_t dim, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<float> centroids(size_t{count} * dim);
  for (float& x : centroids) x = static_cast<float>(static_cast<int>(rng() % 127) - 63);
  for (uint32_t c = 0; c < count; ++c) centroids[size_t{c} * dim + c % dim] = -63;
  return centroids;
}

std::vector<std::pair<double, uint32_t>> ByDistance(const float* x, const std::vector<float>& c,
                                                    uint32_t dim) {
  std::vector<std::pair<double, uint32_t>> order;
  for (uint32_t i = 0; i < c.size() / dim; ++i)
    order.emplace_back(Distance(x, c.data() + size_t{i} * dim, dim), i);
  std::sort(order.begin(), order.end());
  return order;
}

TEST(BytePoints, AByteKeepsAnElementToHalfAStep) {
  const std::vector<float> rows = RandomRows(5, 48, 1);
  const Encoded points(rows, 48);
  for (size_t i = 0; i < rows.size(); ++i)
    EXPECT_LE(std::abs(points.x[i] - rows[i]), 0.501f * points.scale[i / 48]);
  const Encoded zero(std::vector<float>(16, 0.0f), 16);
  EXPECT_EQ(zero.scale[0], 0);
  EXPECT_EQ(zero.x, std::vector<float>(16, 0.0f));
}

TEST(BytePoints, TheNearestCentroidIsFound) {
  for (uint32_t dim : {16u, 48u, 128u}) {
    for (uint32_t count : {1u, 2u, 15u, 16u, 17u, 33u, 100u}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << " count " << count);
      std::vector<float> rows = RandomRows(25, dim, dim);
      for (float& x : rows) x *= 30;
      const Encoded points(rows, dim);
      const std::vector<float> centroids = WholeCentroids(count, dim, count), origin(dim, 0.0f);
      BytePanels panels;
      panels.Assign(centroids.data(), count, dim);
      std::vector<uint32_t> best(25);
      std::vector<float> score(25);
      Nearest(panels, points.table(), 25, best.data(), score.data());
      for (uint32_t r = 0; r < 25; ++r) {
        ASSERT_LT(best[r], count);
        const double found = Distance(points.row(r), centroids.data() + size_t{best[r]} * dim, dim);
        const double expected = ByDistance(points.row(r), centroids, dim)[0].first;
        EXPECT_NEAR(found, expected, 1e-5 * expected);
        EXPECT_NEAR(found, Distance(points.row(r), origin.data(), dim) - 2 * double{score[r]},
                    1e-4 * found);
      }
    }
  }
}

// Of centroids that seven bits do not hold, a point's is about as near as the nearest.
TEST(BytePoints, RoundingCentroidsLosesLittle) {
  const uint32_t dim = 64;
  const Encoded points(RandomRows(200, dim, 3), dim);
  const std::vector<float> centroids = RandomRows(24, dim, 4);
  BytePanels panels;
  panels.Assign(centroids.data(), 24, dim);
  std::vector<uint32_t> best(200);
  Nearest(panels, points.table(), 200, best.data(), nullptr);
  uint32_t other = 0;
  for (uint32_t r = 0; r < 200; ++r) {
    const auto order = ByDistance(points.row(r), centroids, dim);
    other += best[r] != order[0].second ? 1 : 0;
    EXPECT_LE(Distance(points.row(r), centroids.data() + size_t{best[r]} * dim, dim),
              1.02 * order[0].first);
  }
  EXPECT_LE(other, 20u);
}

TEST(BytePoints, TiesGoToTheLowestIndex) {
  const std::vector<float> one = RandomRows(1, 16, 4);
  std::vector<float> centroids;
  for (int i = 0; i < 40; ++i) centroids.insert(centroids.end(), one.begin(), one.end());
  BytePanels panels;
  panels.Assign(centroids.data(), 40, 16);
  const Encoded points(RandomRows(9, 16, 5), 16);
  std::vector<uint32_t> best(9, 99), few(9 * 3, 99);
  Nearest(panels, points.table(), 9, best.data(), nullptr);
  EXPECT_EQ(best, std::vector<uint32_t>(9, 0));
  NearestFew(panels, points.table(), 9, 3, few.data());  // more equals than a vector holds
  for (uint32_t i = 0; i < few.size(); ++i) EXPECT_EQ(few[i], i % 3);
}

TEST(BytePoints, PanelsAreReusableForFewerCentroids) {
  BytePanels panels;
  const std::vector<float> many = RandomRows(50, 32, 6);
  panels.Assign(many.data(), 50, 32);
  panels.Assign(many.data(), 2, 32);
  std::vector<uint32_t> best(2);
  Nearest(panels, Encoded(many, 32).table(), 2, best.data(), nullptr);
  EXPECT_EQ(best, (std::vector<uint32_t>{0, 1}));
}

TEST(BytePoints, FewNearestComeInOrder) {
  for (uint32_t count : {3u, 16u, 37u, 300u}) {
    for (uint32_t few : {1u, 3u, std::min(count, kNearestFewMax)}) {
      SCOPED_TRACE(testing::Message() << count << " centroids, " << few);
      std::vector<float> rows = RandomRows(14, 48, 9);
      for (float& x : rows) x *= 30;
      const Encoded points(rows, 48);
      const std::vector<float> centroids = WholeCentroids(count, 48, count);
      BytePanels panels;
      panels.Assign(centroids.data(), count, 48);
      std::vector<uint32_t> best(14 * few);
      NearestFew(panels, points.table(), 14, few, best.data());
      for (uint32_t r = 0; r < 14; ++r) {
        const auto order = ByDistance(points.row(r), centroids, 48);
        for (uint32_t i = 0; i < few; ++i) EXPECT_EQ(best[r * few + i], order[i].second);
      }
    }
  }
}

TEST(BytePoints, ProjectionsAndSumsFollowTheIds) {
  const Encoded points(RandomRows(11, 80, 10), 80);
  const std::vector<float> line = RandomRows(1, 80, 11);
  const std::vector<uint32_t> ids = {10, 3, 3, 0}, into = {1, 0, 1, 2};
  std::vector<float> out(4), sums(3 * 80, 1.0f), all(80, 0.0f);
  ProjectPoints(line.data(), points.table(ids), 4, out.data());
  AddPointsByIndex(points.table(ids), 4, into.data(), sums.data());
  AddPointsByIndex(points.table(ids), 4, nullptr, all.data());
  for (size_t i = 0; i < 4; ++i) {
    double want = 0;
    for (uint32_t j = 0; j < 80; ++j) want += double{line[j]} * points.row(ids[i])[j];
    EXPECT_NEAR(out[i], want, 1e-4);
  }
  for (uint32_t j = 0; j < 80; ++j) {
    const float three = points.row(3)[j], ten = points.row(10)[j], first = points.row(0)[j];
    EXPECT_NEAR(sums[j], 1 + three, 1e-5);
    EXPECT_NEAR(sums[80 + j], 1 + ten + three, 1e-5);
    EXPECT_NEAR(sums[160 + j], 1 + first, 1e-5);
    EXPECT_NEAR(all[j], ten + 2 * three + first, 1e-5);
  }
}

// Servers and workers of different machines lay out alike (docs/adr/0017).
TEST(BytePoints, PackingIsTheSameOnEveryInstructionSet) {
  const uint32_t dim = 80, count = 3000;
  std::vector<float> k = RandomRows(count, dim, 12);
  const std::vector<float> centres = RandomRows(50, dim, 13);
  for (size_t i = 0; i < k.size(); ++i) k[i] = centres[i / dim % 50 * dim + i % dim] + 0.6f * k[i];
  std::vector<std::byte> stored(k.size() * 2);
  FromF32(k.data(), k.size(), DType::kF16, stored.data());
  const TokenRows rows{DType::kF16, dim, count, stored.data(), stored.data()};
  std::vector<Packing> packings;
  const int64_t supported = hwy::SupportedTargets();
  for (const int64_t target : {supported, int64_t{HWY_AVX2}, int64_t{HWY_AVX3}}) {
    if ((supported & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    packings.push_back(packing::Propose(rows, {}, 9, *MakeCpuAssigner()).value());
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  for (const Packing& packing : packings) {
    EXPECT_EQ(packing.layout.tokens, packings[0].layout.tokens);
    EXPECT_EQ(packing.layout.page_begin, packings[0].layout.page_begin);
    EXPECT_EQ(packing.super_begin, packings[0].super_begin);
  }
}

}  // namespace
}  // namespace icecache
