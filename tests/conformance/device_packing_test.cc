// Packing with its assignments on a device: the same nearest centroids as on the CPU, and layouts
// as good.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/distance.h"
#include "kernels/gpu/assigner_gpu.h"
#include "kernels/packing.h"
#include "tests/conformance/device_suite.h"

namespace icecache::gpu {
namespace {

class DevicePackingSuite : public DeviceSuite {
 protected:
  std::vector<float> Normal(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& e : x) e = normal(rng_);
    return x;
  }
  // Whole numbers up to `top`, which every row reaches: rounding to bytes leaves them as they are.
  std::vector<float> Whole(size_t count, uint32_t dim, int top) {
    std::uniform_int_distribution<int> uniform(-top, top);
    std::vector<float> x(count * dim);
    for (float& e : x) e = static_cast<float>(uniform(rng_));
    for (size_t i = 0; i < count; ++i) x[i * dim] = static_cast<float>(top);
    return x;
  }
  std::mt19937_64 rng_{77};
};

// Sets of every kind: fewer rows than a block has threads and more, one centroid and several passes
// of them, one nearest and many. All sums are whole and exact on both sides, near ties as well.
TEST_P(DevicePackingSuite, NearestCentroidsAreThoseOfTheCpu) {
  for (const uint32_t dim : {16u, 48u, 128u}) {
    SCOPED_TRACE(dim);
    const uint32_t count = 300;
    std::vector<uint8_t> bytes(size_t{count} * dim);
    std::vector<float> scale(count);
    const std::vector<float> x = Whole(count, dim, 127);
    for (uint32_t i = 0; i < count; ++i) {
      scale[i] = EncodePoint(x.data() + size_t{i} * dim, dim, bytes.data() + size_t{i} * dim);
      ASSERT_EQ(scale[i], 1);
    }
    const struct {
      uint32_t rows, centroids, few;
    } shapes[] = {{1, 1, 1}, {300, 24, 1}, {129, 33, 1}, {128, 70, 10}, {40, 3, 3}, {7, 16, 16}};
    std::vector<std::vector<float>> centroids;
    std::vector<std::vector<uint32_t>> rows;
    std::vector<AssignTask> tasks;
    for (const auto& shape : shapes) {
      centroids.push_back(Whole(shape.centroids, dim, 63));
      if (shape.centroids > 1) {  // two equal ones: the lower index goes first
        std::copy_n(centroids.back().begin(), dim, centroids.back().end() - dim);
      }
      rows.emplace_back(shape.rows);
      for (uint32_t& row : rows.back()) row = static_cast<uint32_t>(rng_() % count);
    }
    std::vector<std::vector<std::vector<uint32_t>>> best(2);
    std::vector<std::vector<std::vector<float>>> scores(2);
    const auto cpu = MakeCpuAssigner(), on_device = MakeGpuAssigner(*device_);
    for (size_t i = 0; i < 2; ++i) {
      PointAssigner& assigner = i == 0 ? *cpu : *on_device;
      tasks.clear();
      best[i].resize(std::size(shapes));
      scores[i].resize(std::size(shapes));
      for (size_t t = 0; t < std::size(shapes); ++t) {
        best[i][t].resize(shapes[t].rows * shapes[t].few);
        scores[i][t].resize(shapes[t].rows);
        tasks.push_back({rows[t], centroids[t].data(), shapes[t].centroids, shapes[t].few,
                         best[i][t].data(), shapes[t].few == 1 ? scores[i][t].data() : nullptr});
      }
      ASSERT_TRUE(assigner.Load({bytes.data(), scale.data(), dim}, count).ok());
      ASSERT_TRUE(assigner.Assign(tasks).ok());
      ASSERT_TRUE(assigner.Assign({}).ok());
    }
    for (size_t t = 0; t < std::size(shapes); ++t) {
      EXPECT_EQ(best[1][t], best[0][t]) << "set " << t;
      if (shapes[t].few > 1) continue;
      EXPECT_EQ(scores[1][t], scores[0][t]) << "set " << t;
    }
  }
}

// Near ties may fall differently, so layouts need not be equal; they have to be as pure.
TEST_P(DevicePackingSuite, LayoutsAreAsPureAsTheCpus) {
  const uint32_t dim = 32, count = 1500;
  const std::vector<float> centres = Normal(40 * dim);
  std::vector<float> k = Normal(size_t{count} * dim), v = Normal(size_t{count} * dim);
  for (uint32_t t = 0; t < count; ++t) {
    const float* const centre = centres.data() + rng_() % 40 * dim;
    for (uint32_t j = 0; j < dim; ++j)
      k[size_t{t} * dim + j] = centre[j] + 0.6f * k[size_t{t} * dim + j];
  }
  std::vector<std::byte> k_rows(k.size() * 2), v_rows(v.size() * 2);
  FromF32(k.data(), k.size(), DType::kF16, k_rows.data());
  FromF32(v.data(), v.size(), DType::kF16, v_rows.data());
  const TokenRows rows{DType::kF16, dim, count, k_rows.data(), v_rows.data()};
  const auto cpu = MakeCpuAssigner(), on_device = MakeGpuAssigner(*device_);
  std::vector<float> spread;
  std::vector<uint32_t> pages;
  for (PointAssigner* assigner : {cpu.get(), on_device.get()}) {
    const Result<Packing> packing = packing::Propose(rows, {}, 9, *assigner);
    ASSERT_TRUE(packing.ok()) << packing.status().ToString();
    const Status sound = CheckPacking(*packing, count);
    ASSERT_TRUE(sound.ok()) << sound.ToString();
    packing::Basis basis = packing::BasisOf(rows, {});
    packing::LearnPages(rows, packing::PackSequential(count), packing::SketchUse::kOff, &basis);
    const float sequential = basis.page_spread;
    packing::LearnPages(rows, *packing, packing::SketchUse::kOff, &basis);
    spread.push_back(basis.page_spread);
    pages.push_back(packing->layout.page_count());
    EXPECT_LT(basis.page_spread, 0.6f * sequential);
  }
  EXPECT_NEAR(spread[1], spread[0], 0.01f * spread[0]);
  EXPECT_NEAR(pages[1], pages[0], 2);
}

INSTANTIATE_DEVICES(DevicePackingSuite);

}  // namespace
}  // namespace icecache::gpu
