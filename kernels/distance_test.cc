#include "kernels/distance.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace icecache {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr uint32_t kDims[] = {16, 64, 80, 96, 128, 256};

struct Rows {
  std::vector<std::byte> bytes;
  std::vector<float> values;  // what the bytes stand for
};

Rows RandomRows(std::mt19937_64& rng, DType dtype, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& e : x) e = normal(rng);
  Rows rows{std::vector<std::byte>(count * DTypeBytes(dtype) + 1), std::vector<float>(count)};
  // One byte of offset: no alignment is promised.
  FromF32(x.data(), count, dtype, rows.bytes.data() + 1);
  ToF32(rows.bytes.data() + 1, dtype, count, rows.values.data());
  return rows;
}

TEST(Distance, DotRowsEqualsScalarSums) {
  std::mt19937_64 rng(11);
  std::normal_distribution<float> normal;
  for (const DType dtype : kDTypes) {
    for (const uint32_t dim : kDims) {
      for (const uint32_t group : {1u, 2u, 3u, 4u, 5u, 6u, 8u, 16u}) {
        for (const uint32_t count : {0u, 1u, 3u, 8u, 15u, 16u, 17u, 37u}) {
          const Rows rows = RandomRows(rng, dtype, size_t{count} * dim);
          std::vector<float> q(size_t{group} * dim);
          for (float& x : q) x = normal(rng);
          const size_t stride = count + 5;
          std::vector<float> scores(group * stride, -777.0f);
          DotRows(q.data(), group, rows.bytes.data() + 1, dtype, count, dim, scores.data(), stride);
          for (uint32_t h = 0; h < group; ++h) {
            for (uint32_t r = 0; r < count; ++r) {
              double sum = 0;
              for (uint32_t j = 0; j < dim; ++j)
                sum += double{q[h * dim + j]} * rows.values[size_t{r} * dim + j];
              ASSERT_NEAR(scores[h * stride + r], sum, 2e-4)
                  << DTypeName(dtype) << " dim " << dim << " group " << group << " row " << r;
            }
            for (size_t r = count; r < stride; ++r)  // nothing beyond the rows is written
              ASSERT_EQ(scores[h * stride + r], -777.0f);
          }
        }
      }
    }
  }
}

TEST(Distance, AddWeightedRowsEqualsScalarSums) {
  std::mt19937_64 rng(12);
  std::normal_distribution<float> normal;
  for (const DType dtype : kDTypes) {
    for (const uint32_t dim : kDims) {
      for (const uint32_t group : {1u, 2u, 4u, 6u, 8u, 16u}) {
        for (const uint32_t count : {0u, 1u, 7u, 16u, 35u}) {
          const Rows rows = RandomRows(rng, dtype, size_t{count} * dim);
          const size_t stride = count + 2;
          std::vector<float> w(group * stride), out(size_t{group} * dim), start;
          for (float& x : w) x = normal(rng);
          for (float& x : out) x = normal(rng);
          start = out;
          AddWeightedRows(w.data(), stride, group, rows.bytes.data() + 1, dtype, count, dim,
                          out.data());
          for (uint32_t h = 0; h < group; ++h) {
            for (uint32_t j = 0; j < dim; ++j) {
              double sum = start[h * dim + j];
              for (uint32_t r = 0; r < count; ++r)
                sum += double{w[h * stride + r]} * rows.values[size_t{r} * dim + j];
              ASSERT_NEAR(out[h * dim + j], sum, 1e-4)
                  << DTypeName(dtype) << " dim " << dim << " group " << group << " count " << count;
            }
          }
        }
      }
    }
  }
}

TEST(Distance, ConversionsAgreeWithTheScalarOnes) {
  std::vector<float> x;
  for (uint32_t bits = 0; bits < 0xffffffffu - 65537u; bits += 65521u * 7)
    x.push_back(std::bit_cast<float>(bits));
  x.insert(x.end(),
           {0.0f, -0.0f, 1.0f, 65504.0f, 65520.0f, 1e30f, std::numeric_limits<float>::infinity(),
            -std::numeric_limits<float>::infinity(), 5.96e-8f, 1e-8f});
  std::vector<std::byte> out(2 * x.size());
  std::vector<float> back(x.size());
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    FromF32(x.data(), x.size(), dtype, out.data());
    ToF32(out.data(), dtype, x.size(), back.data());
    for (size_t i = 0; i < x.size(); ++i) {
      if (std::isnan(x[i])) {
        EXPECT_TRUE(std::isnan(back[i]));
        continue;
      }
      const float expected =
          dtype == DType::kF16 ? F16ToF32(F32ToF16(x[i])) : BF16ToF32(F32ToBF16(x[i]));
      EXPECT_EQ(back[i], expected) << DTypeName(dtype) << " of " << x[i];
    }
  }
}

TEST(Distance, AllFiniteFindsOneBadElementAnywhere) {
  for (const DType dtype : kDTypes) {
    for (const size_t count : {size_t{1}, size_t{15}, size_t{128}, size_t{9000}}) {
      std::vector<float> x(count, std::numeric_limits<float>::lowest() / 2);
      if (dtype == DType::kF16) x.assign(count, -65504.0f);
      std::vector<std::byte> bytes(count * DTypeBytes(dtype));
      FromF32(x.data(), count, dtype, bytes.data());
      EXPECT_TRUE(AllFinite(bytes.data(), dtype, count));
      for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()}) {
        for (const size_t at : {size_t{0}, count / 2, count - 1}) {
          std::vector<float> y = x;
          y[at] = bad;
          FromF32(y.data(), count, dtype, bytes.data());
          EXPECT_FALSE(AllFinite(bytes.data(), dtype, count)) << DTypeName(dtype) << " at " << at;
        }
      }
    }
    EXPECT_TRUE(AllFinite(nullptr, dtype, 0));
  }
}

TEST(Distance, ExpShiftedIsAccurateOverItsRange) {
  std::vector<float> x, y;
  for (float e = -87.0f; e <= 0.0f; e += 0.00137f) x.push_back(e + 5.0f);
  y.resize(x.size());
  const float sum = ExpShifted(x.data(), x.size(), 5.0f, y.data());
  double expected_sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(double{x[i] - 5.0f});
    expected_sum += expected;
    if (x[i] - 5.0f >= -87.0f) {
      EXPECT_NEAR(y[i] / expected, 1.0, 2e-6) << x[i] - 5.0f;
    }
  }
  EXPECT_NEAR(sum / expected_sum, 1.0, 1e-5);
}

TEST(Distance, ExpShiftedBelowItsRangeIsZero) {
  float x[5] = {-88.0f, -1e30f, -std::numeric_limits<float>::infinity(), 0.0f, -200.0f};
  const float sum = ExpShifted(x, 5, 0.0f, x);  // in place
  EXPECT_EQ(sum, 1.0f);
  EXPECT_EQ(x[0], 0.0f);
  EXPECT_EQ(x[2], 0.0f);
  EXPECT_EQ(x[3], 1.0f);
}

TEST(Distance, MaxOfFindsItAtEveryLength) {
  EXPECT_EQ(MaxOf(nullptr, 0), -std::numeric_limits<float>::infinity());
  for (size_t count = 1; count < 40; ++count) {
    std::vector<float> x(count, -5.0f);
    for (size_t at = 0; at < count; ++at) {
      x[at] = -1.0f;
      EXPECT_EQ(MaxOf(x.data(), count), -1.0f);
      x[at] = -5.0f;
    }
  }
}

}  // namespace
}  // namespace icecache
