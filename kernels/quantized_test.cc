#include "kernels/quantized.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/test_blocks.h"

namespace icecache {
namespace {

TEST(Quantized, ScoresOfBlocksAreTheIntegerDotProducts) {
  for (uint32_t dim : {16u, 32u, 80u, 128u, 256u}) {
    for (uint32_t group : {1u, 2u, 3u, 4u, 6u, 8u, 13u}) {
      for (uint32_t digits : {1u, 2u}) {
        SCOPED_TRACE(testing::Message()
                     << "dim " << dim << " group " << group << " digits " << digits);
        const Blocks blocks(3, dim, dim + group);
        QuantizedQueries q;
        const std::vector<float> queries = RandomRows(group, dim, 5 + group);
        q.Assign(queries.data(), group, dim, digits);
        std::vector<float> base(group), out(group * 64, -1.0f);
        for (uint32_t g = 0; g < group; ++g) base[g] = static_cast<float>(g);
        ScoreBlocks(q, blocks.blocks.data(), blocks.scale_rows.data(), 3, base.data(), out.data(),
                    64);
        for (uint32_t g = 0; g < group; ++g) {
          for (uint32_t r = 0; r < 48; ++r) {
            const double want = base[g] + double{q.step(g)} * blocks.scales[r] *
                                              static_cast<double>(IntegerDot(
                                                  q, g, blocks.rows.data() + size_t{r} * dim));
            EXPECT_NEAR(out[g * 64 + r], want, 1e-5 * (1 + std::fabs(want)));
          }
          EXPECT_EQ(out[g * 64 + 48], -1.0f) << "wrote past the last block";
        }
      }
    }
  }
}

TEST(Quantized, ExtremeBytesAndQueriesDoNotSaturate) {
  constexpr uint32_t kDim = 256;
  Blocks blocks(1, kDim, 1);
  for (int sign : {1, -1}) {
    std::vector<int8_t> row(kDim, static_cast<int8_t>(127 * sign));
    std::vector<float> query(kDim, 1.0f);
    for (uint32_t lane = 0; lane < kBlockRows; ++lane)
      PackBlockRow(row.data(), kDim, lane, blocks.bytes.data());
    std::fill(blocks.scales.begin(), blocks.scales.end(), 1.0f);
    for (uint32_t digits : {1u, 2u}) {
      QuantizedQueries q;
      q.Assign(query.data(), 1, kDim, digits);
      const float base = 0;
      float out[kBlockRows];
      ScoreBlocks(q, blocks.blocks.data(), blocks.scale_rows.data(), 1, &base, out, kBlockRows);
      EXPECT_NEAR(out[7], 127.0f * sign * kDim, 0.05f);
    }
  }
}

TEST(Quantized, TwoDigitsKeepTwelveBitsOfAQuery) {
  constexpr uint32_t kDim = 128;
  const std::vector<float> query = RandomRows(1, kDim, 3);
  for (uint32_t digits : {1u, 2u}) {
    QuantizedQueries q;
    q.Assign(query.data(), 1, kDim, digits);
    for (uint32_t j = 0; j < kDim; ++j) {
      int32_t x = q.row(0)[j];
      if (digits == 2) x = x * 64 + q.row(0)[kDim + j];
      EXPECT_NEAR(q.step(0) * static_cast<float>(x), query[j], 0.51f * q.step(0));
    }
    const float top = *std::max_element(
        query.begin(), query.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    EXPECT_LT(q.step(0), std::fabs(top) / (digits == 2 ? 4000.0f : 60.0f));
  }
}

TEST(Quantized, QueriesThatAreNotFiniteCountAsZero) {
  std::vector<float> queries(2 * 16, 1.0f);
  queries[3] = std::numeric_limits<float>::quiet_NaN();
  QuantizedQueries q;
  q.Assign(queries.data(), 2, 16, 2);
  EXPECT_EQ(q.step(0), 0.0f);
  EXPECT_EQ(q.sum(0), 0);
  EXPECT_GT(q.step(1), 0.0f);
}

TEST(Quantized, AddInt8RowsAddsWeightedRows) {
  for (uint32_t dim : {64u, 80u, 128u, 256u}) {
    for (uint32_t group : {1u, 3u, 4u, 8u}) {
      const uint32_t count = 131;
      const Blocks source(9, dim, dim);
      std::vector<const int8_t*> rows;
      for (uint32_t i = 0; i < count; ++i) rows.push_back(source.rows.data() + size_t{i} * dim);
      const std::vector<float> weights = RandomRows(group, 140, 77);
      std::vector<float> out(group * dim, 2.0f);
      AddInt8Rows(weights.data(), 140, group, rows.data(), count, dim, out.data());
      for (uint32_t g = 0; g < group; ++g) {
        for (uint32_t d = 0; d < dim; d += 7) {
          double want = 2;
          for (uint32_t i = 0; i < count; ++i) want += double{weights[g * 140 + i]} * rows[i][d];
          EXPECT_NEAR(out[g * dim + d], want, 0.01);
        }
      }
    }
  }
}

TEST(Quantized, RowsSurviveQuantisingAndPacking) {
  for (uint32_t dim : {16u, 80u, 128u}) {
    const std::vector<float> row = RandomRows(1, dim, dim);
    std::vector<int8_t> q(dim), back(dim);
    std::vector<uint8_t> block(size_t{dim} * kBlockRows, 0);
    const float scale = QuantizeRow(row.data(), dim, q.data());
    PackBlockRow(q.data(), dim, 5, block.data());
    UnpackBlockRow(block.data(), dim, 5, back.data());
    EXPECT_EQ(q, back);
    int top = 0;
    for (uint32_t j = 0; j < dim; ++j) {
      EXPECT_NEAR(scale * static_cast<float>(q[j]), row[j], 0.51f * scale);
      top = std::max(top, std::abs(static_cast<int>(q[j])));
    }
    EXPECT_EQ(top, 127);
    ClearBlockRow(dim, 5, block.data());
    UnpackBlockRow(block.data(), dim, 5, back.data());
    EXPECT_EQ(back, std::vector<int8_t>(dim, 0));
  }
  std::vector<float> zeros(32, 0.0f);
  std::vector<int8_t> q(32, 1);
  EXPECT_EQ(QuantizeRow(zeros.data(), 32, q.data()), 0.0f);
  EXPECT_EQ(q, std::vector<int8_t>(32, 0));
}

TEST(Quantized, IndicesAtLeastFindsThemAllInOrder) {
  for (uint32_t count : {0u, 1u, 7u, 16u, 33u, 200u}) {
    const std::vector<float> x = RandomRows(1, count, count + 1);
    for (float bound : {-10.0f, 0.0f, 1.5f, 10.0f}) {
      std::vector<uint32_t> got(count + 16), want;
      got.resize(IndicesAtLeast(x.data(), count, bound, got.data()));
      for (uint32_t i = 0; i < count; ++i) {
        if (x[i] >= bound) want.push_back(i);
      }
      EXPECT_EQ(got, want);
    }
  }
}

}  // namespace
}  // namespace icecache
