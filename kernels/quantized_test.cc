#include "kernels/quantized.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace icecache {
namespace {

// Random rows in blocks, with the plain rows kept for reference.
struct Blocks {
  Blocks(uint32_t block_count, uint32_t dim, uint64_t seed)
      : rows(size_t{block_count} * kBlockRows * dim),
        bytes(rows.size()),
        scales(block_count * kBlockRows) {
    std::mt19937_64 rng(seed);
    for (int8_t& x : rows) x = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
    for (float& s : scales) s = 0.001f * static_cast<float>(1 + rng() % 100);
    for (uint32_t b = 0; b < block_count; ++b) {
      blocks.push_back(bytes.data() + size_t{b} * kBlockRows * dim);
      scale_rows.push_back(scales.data() + size_t{b} * kBlockRows);
      for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
        PackBlockRow(rows.data() + (size_t{b} * kBlockRows + lane) * dim, dim, lane,
                     bytes.data() + size_t{b} * kBlockRows * dim);
      }
    }
  }
  std::vector<int8_t> rows;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<const uint8_t*> blocks;
  std::vector<const float*> scale_rows;
};

// Integer dot product of head g's digits with a row: what every instruction set must give.
int64_t IntegerDot(const QuantizedQueries& q, uint32_t g, const int8_t* row) {
  int64_t sum = 0;
  for (uint32_t j = 0; j < q.dim(); ++j) {
    int64_t digit = q.row(g)[j];
    if (q.digits() == 2) digit = digit * 64 + q.row(g)[q.dim() + j];
    sum += digit * row[j];
  }
  return sum;
}

std::vector<float> RandomQueries(uint32_t group, uint32_t dim, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t{group} * dim);
  for (float& x : q) x = normal(rng);
  return q;
}

TEST(Quantized, ScoresOfBlocksAreTheIntegerDotProducts) {
  for (uint32_t dim : {16u, 32u, 80u, 128u, 256u}) {
    for (uint32_t group : {1u, 2u, 3u, 4u, 6u, 8u, 13u}) {
      for (uint32_t digits : {1u, 2u}) {
        SCOPED_TRACE(testing::Message()
                     << "dim " << dim << " group " << group << " digits " << digits);
        const Blocks blocks(3, dim, dim + group);
        QuantizedQueries q;
        const std::vector<float> queries = RandomQueries(group, dim, 5 + group);
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
  const std::vector<float> query = RandomQueries(1, kDim, 3);
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
  EXPECT_EQ(q.bias(0), 0);
  EXPECT_GT(q.step(1), 0.0f);
}

TEST(Quantized, SketchWeightsAreExponentialsOfTheirLogits) {
  constexpr uint32_t kDim = 32, kPages = 37;
  const Blocks blocks(kPages, kDim, 9);
  std::vector<SketchPage> pages;
  for (uint32_t p = 0; p < kPages; ++p)
    pages.push_back({blocks.blocks[p], 0.002f, 1 + p % kBlockRows});
  for (uint32_t group : {1u, 2u, 4u, 5u, 8u}) {
    SCOPED_TRACE(group);
    QuantizedQueries q;
    const std::vector<float> queries = RandomQueries(group, kDim, group);
    q.Assign(queries.data(), group, kDim, 1);
    std::vector<float> centre(group * kPages), weights(group * kPages * kBlockRows),
        sum(group * kPages), top(sum);
    for (size_t i = 0; i < centre.size(); ++i) centre[i] = -0.3f * static_cast<float>(i % 300);
    ScoreSketches(q, pages.data(), kPages, centre.data(), kPages, weights.data(), sum.data(),
                  top.data());
    for (uint32_t g = 0; g < group; ++g) {
      for (uint32_t p = 0; p < kPages; ++p) {
        double total = 0, best = 0;
        for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
          const size_t at = (size_t{g} * kPages + p) * kBlockRows + lane;
          const double logit = centre[g * kPages + p] +
                               double{q.step(g)} * pages[p].scale *
                                   static_cast<double>(IntegerDot(
                                       q, g, blocks.rows.data() + (p * kBlockRows + lane) * kDim));
          const double want = lane < pages[p].fill && logit > -87 ? std::exp(logit) : 0.0;
          EXPECT_NEAR(weights[at], want, 1e-5 * want + 1e-37);
          total += want;
          best = std::max(best, want);
        }
        EXPECT_NEAR(sum[g * kPages + p], total, 1e-5 * total + 1e-37);
        EXPECT_NEAR(top[g * kPages + p], best, 1e-5 * best + 1e-37);
      }
    }
  }
}

TEST(Quantized, SketchExponentIsCutWhereFloatsStillAdd) {
  const Blocks blocks(1, 32, 2);
  const SketchPage page{blocks.blocks[0], 0.0f, 16};
  QuantizedQueries q;
  const std::vector<float> query(32, 1.0f);
  q.Assign(query.data(), 1, 32, 1);
  const float centre = 1e30f;
  float weights[16], sum, top;
  ScoreSketches(q, &page, 1, &centre, 1, weights, &sum, &top);
  EXPECT_TRUE(std::isfinite(sum));
  EXPECT_NEAR(std::log(top), kSketchExponentMax, 0.01f);
}

TEST(Quantized, AddInt8RowsAddsWeightedRows) {
  for (uint32_t dim : {64u, 80u, 128u, 256u}) {
    for (uint32_t group : {1u, 3u, 4u, 8u}) {
      const uint32_t count = 131;
      const Blocks source(9, dim, dim);
      std::vector<const int8_t*> rows;
      for (uint32_t i = 0; i < count; ++i) rows.push_back(source.rows.data() + size_t{i} * dim);
      const std::vector<float> weights = RandomQueries(group, 140, 77);
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
    const std::vector<float> row = RandomQueries(1, dim, dim);
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
    const std::vector<float> x = RandomQueries(1, count, count + 1);
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
