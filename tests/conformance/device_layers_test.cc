// The parts of a transformer layer on every device, against float64.
#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/distance.h"
#include "tests/conformance/device_suite.h"

namespace icecache::gpu {
namespace {

class DeviceLayersSuite : public DeviceSuite {
 protected:
  std::vector<float> Normal(size_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> x(count);
    for (float& e : x) e = normal(rng_);
    return x;
  }
  std::mt19937_64 rng_{20260};
};

TEST_P(DeviceLayersSuite, NormOfTokensAndOfHeadsInPlace) {
  // 3 tokens of 2 heads with 80 elements each, within rows of 200.
  const std::vector<float> x = Normal(600), weight = Normal(80);
  float* const on_device = Upload(x);
  NormArgs args{on_device, on_device, Upload(weight), 6, 80, 2, 200, 200, 1e-5f};
  device_->Launch(args);
  std::vector<float> expected = x;
  for (size_t t = 0; t < 3; ++t) {
    for (size_t h = 0; h < 2; ++h) {
      const size_t at = t * 200 + h * 80;
      double sum = 0;
      for (size_t i = 0; i < 80; ++i) sum += double{x[at + i]} * x[at + i];
      const double scale = 1 / std::sqrt(sum / 80 + 1e-5);
      for (size_t i = 0; i < 80; ++i) {
        expected[at + i] = static_cast<float>(x[at + i] * scale * weight[i]);
      }
    }
  }
  const std::vector<float> actual = Download(on_device, 600);
  for (size_t i = 0; i < 600; ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5f) << i;
}

TEST_P(DeviceLayersSuite, RopeTurnsQueriesAndKeysAtFarPositions) {
  const uint32_t dim = 96, half = 48, query_heads = 3, kv_heads = 2;
  const std::vector<uint32_t> positions = {0, 17, 131071};
  std::vector<double> frequencies(half);
  for (uint32_t i = 0; i < half; ++i) frequencies[i] = std::pow(5e5, -2.0 * i / dim);
  const std::vector<float> q = Normal(3 * query_heads * dim), k = Normal(3 * kv_heads * dim);
  float* const q_rows = Upload(q);
  float* const k_rows = Upload(k);
  device_->Launch(gpu::RopeArgs{q_rows, k_rows, Upload(frequencies), Upload(positions), 3,
                                query_heads, kv_heads, dim, 0.25f, 1.1});
  const auto expect_turned = [&](const std::vector<float>& actual, const std::vector<float>& x,
                                 uint32_t heads, double scale) {
    for (size_t row = 0; row < size_t{3} * heads; ++row) {
      for (uint32_t i = 0; i < half; ++i) {
        const size_t at = row * dim + i;
        const double angle = positions[row / heads] * frequencies[i];
        const double c = std::cos(angle) * scale, s = std::sin(angle) * scale;
        ASSERT_NEAR(actual[at], x[at] * c - x[at + half] * s, 2e-6) << row << " " << i;
        ASSERT_NEAR(actual[at + half], x[at + half] * c + x[at] * s, 2e-6) << row << " " << i;
      }
    }
  };
  expect_turned(Download(q_rows, q.size()), q, query_heads, 1.1 * 0.25);
  expect_turned(Download(k_rows, k.size()), k, kv_heads, 1.1);
}

TEST_P(DeviceLayersSuite, SwiGluAlsoOfHugeGates) {
  std::vector<float> x = Normal(3 * 2 * 70);
  x[0] = 200;
  x[1] = -200;
  float* const y = Room<float>(210);
  device_->Launch(SwiGluArgs{Upload(x), y, 3, 70});
  const std::vector<float> actual = Download(y, 210);
  for (size_t t = 0; t < 3; ++t) {
    for (size_t i = 0; i < 70; ++i) {
      const double gate = x[t * 140 + i], up = x[t * 140 + 70 + i];
      ASSERT_NEAR(actual[t * 70 + i], gate / (1 + std::exp(-gate)) * up, 1e-5) << t << " " << i;
    }
  }
}

TEST_P(DeviceLayersSuite, ConvertRoundsAndRepeats) {
  const std::vector<float> x = Normal(100);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    std::byte* const to = Room<std::byte>(300 * DTypeBytes(dtype));
    device_->Launch(ConvertArgs{Upload(x), to, dtype, 300, 100});
    std::vector<float> actual(300), expected(300);
    ToF32(Download(to, 300 * DTypeBytes(dtype)).data(), dtype, 300, actual.data());
    std::vector<std::byte> rounded(100 * DTypeBytes(dtype));
    FromF32(x.data(), 100, dtype, rounded.data());
    for (int i = 0; i < 3; ++i) ToF32(rounded.data(), dtype, 100, expected.data() + 100 * i);
    EXPECT_EQ(actual, expected) << DTypeName(dtype);
  }
}

// Every path: one token, few, tiles; with bias, added; columns that end within a vector load.
TEST_P(DeviceLayersSuite, ProductsOfEveryShapeAndType) {
  struct Shape {
    uint32_t tokens, rows, cols;
  };
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Shape s : {Shape{1, 37, 512}, Shape{1, 5, 30}, Shape{3, 18, 264}, Shape{8, 9, 300},
                          Shape{70, 66, 40}, Shape{9, 130, 35}}) {
      for (const bool add : {false, true}) {
        SCOPED_TRACE(testing::Message() << DTypeName(dtype) << " " << s.tokens << " tokens, "
                                        << s.rows << " x " << s.cols << (add ? ", added" : ""));
        const std::vector<float> x = Normal(size_t{s.tokens} * s.cols), bias = Normal(s.rows);
        const std::vector<float> old = Normal(size_t{s.tokens} * s.rows);
        std::vector<std::byte> w(size_t{s.rows} * s.cols * DTypeBytes(dtype));
        FromF32(Normal(size_t{s.rows} * s.cols, 0.1f).data(), size_t{s.rows} * s.cols, dtype,
                w.data());
        std::vector<float> weights(size_t{s.rows} * s.cols);
        ToF32(w.data(), dtype, weights.size(), weights.data());
        float* const y = Upload(old);
        // Added products have no bias in any model.
        device_->Launch(GemmArgs{Upload(x), Upload(w), add ? nullptr : Upload(bias), y, dtype,
                                 s.tokens, s.rows, s.cols, add});
        const std::vector<float> actual = Download(y, old.size());
        // A library rounds activations to the weights' type when there are many.
        const bool rounds = s.tokens > kGemvTokensMax && GetParam().name == "cuda";
        const double tolerance = rounds && dtype != DType::kF32 ? 0.05 : 2e-5;
        for (uint32_t t = 0; t < s.tokens; ++t) {
          for (uint32_t r = 0; r < s.rows; ++r) {
            double sum = add ? old[size_t{t} * s.rows + r] : bias[r];
            for (uint32_t c = 0; c < s.cols; ++c) {
              sum += double{x[size_t{t} * s.cols + c]} * weights[size_t{r} * s.cols + c];
            }
            ASSERT_NEAR(actual[size_t{t} * s.rows + r], sum, tolerance) << t << ", " << r;
          }
        }
      }
    }
  }
}

INSTANTIATE_DEVICES(DeviceLayersSuite);

}  // namespace
}  // namespace icecache::gpu
