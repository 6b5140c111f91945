#include "worker/model/gemm.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/distance.h"

namespace icecache {
namespace {

struct GemmCase {
  uint32_t tokens, rows, cols;
  DType dtype;
  uint32_t threads;
  bool bias;
  bool misaligned;
};

void CheckProduct(const GemmCase& c) {
  SCOPED_TRACE(testing::Message() << c.tokens << " tokens, " << c.rows << "x" << c.cols << " "
                                  << DTypeName(c.dtype) << ", threads " << c.threads);
  std::mt19937 random(c.tokens * 31 + c.rows);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(size_t{c.tokens} * c.cols), w(size_t{c.rows} * c.cols), bias(c.rows);
  for (float& value : x) value = uniform(random);
  for (float& value : w) value = uniform(random);
  for (float& value : bias) value = uniform(random);
  std::vector<std::byte> stored(w.size() * DTypeBytes(c.dtype) + 1);
  std::byte* data = stored.data() + (c.misaligned ? 1 : 0);
  FromF32(w.data(), w.size(), c.dtype, data);
  ToF32(data, c.dtype, w.size(), w.data());
  std::vector<float> y(size_t{c.tokens} * c.rows, NAN);
  Gemm gemm(c.threads);
  gemm.Multiply(x.data(), c.tokens, {data, c.dtype, c.rows, c.cols}, c.bias ? bias.data() : nullptr,
                y.data());
  double worst = 0;
  for (uint32_t t = 0; t < c.tokens; ++t) {
    for (uint32_t r = 0; r < c.rows; ++r) {
      double expected = c.bias ? bias[r] : 0;
      for (uint32_t i = 0; i < c.cols; ++i)
        expected += double{x[t * c.cols + i]} * w[r * c.cols + i];
      const double error = std::fabs(y[size_t{t} * c.rows + r] - expected);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  EXPECT_LT(worst, 1e-5 * c.cols);
}

TEST(Gemm, EqualsTheSumInDoubleForEveryPath) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const uint32_t tokens : {1u, 16u, 17u, 130u}) {
      CheckProduct({tokens, 200, 64, dtype, 1, true, false});
      CheckProduct({tokens, 33, 50, dtype, 3, false, false});  // not a whole vector
      CheckProduct({tokens, 77, 96, dtype, 2, true, true});    // an odd address
    }
  }
  CheckProduct({1, 3000, 512, DType::kF16, 4, true, false});  // large enough to be shared
  CheckProduct({3, 1500, 512, DType::kF32, 3, false, false});
}

TEST(Gemm, NoTokensIsNoWork) {
  Gemm gemm(2);
  float untouched = 7;
  gemm.Multiply(nullptr, 0, {nullptr, DType::kF32, 4, 4}, nullptr, &untouched);
  EXPECT_EQ(untouched, 7);
}

TEST(ComputeThreads, EveryIterationRunsOnceWithAThreadOfItsOwn) {
  for (const uint32_t count : {1u, 2u, 5u}) {
    ComputeThreads threads(count);
    ASSERT_EQ(threads.count(), count);
    for (const uint32_t iterations : {0u, 1u, 2u, 1000u}) {
      std::vector<std::atomic<uint32_t>> runs(iterations);
      std::vector<std::atomic<bool>> busy(count);
      threads.For(iterations, [&](uint32_t index, uint32_t thread) {
        ASSERT_LT(thread, count);
        EXPECT_FALSE(busy[thread].exchange(true));
        ++runs[index];
        busy[thread] = false;
      });
      for (const auto& times : runs) EXPECT_EQ(times, 1u);
    }
  }
}

TEST(ComputeThreads, ManyShortLoopsDoNotMixTheirIterations) {
  ComputeThreads threads(4);
  for (uint32_t loop = 0; loop < 2000; ++loop) {
    std::atomic<uint64_t> sum = 0;
    threads.For(7, [&](uint32_t index, uint32_t) { sum += index + loop; });
    ASSERT_EQ(sum, 21 + 7ull * loop);
  }
}

}  // namespace
}  // namespace icecache
