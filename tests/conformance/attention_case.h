// Random pages and queries for tests of attention, and what it means that two results agree.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "common/limits.h"
#include "kernels/attention.h"
#include "kernels/distance.h"

namespace icecache {

// Pages of one slice with random fills, and the same tokens as plain rows.
struct AttentionCase {
  AttentionCase(uint64_t seed, DType dtype_in, uint32_t dim_in, uint32_t group_in,
                uint32_t page_count, float logit_scale)
      : dtype(dtype_in), dim(dim_in), group(group_in) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<uint32_t> fills;
    uint32_t tokens = 0;
    for (uint32_t p = 0; p < page_count; ++p) {
      fills.push_back(1 + rng() % limits::kPageTokens);
      tokens += fills.back();
    }
    k = Random(rng, size_t{tokens} * dim);
    v = Random(rng, size_t{tokens} * dim);
    queries.resize(size_t{group} * dim);
    for (float& x : queries) x = logit_scale * normal(rng) / std::sqrt(static_cast<float>(dim));
    size_t at = 0;
    for (const uint32_t fill : fills) {
      views.push_back({k.data() + at, v.data() + at, fill});
      at += size_t{fill} * dim * DTypeBytes(dtype);
    }
    rows = {dtype, dim, tokens, k.data(), v.data()};
    kv = {dtype, dim, page_count, views.data()};
    for (uint32_t p = 0; p < page_count; ++p) ids.emplace_back(p);
  }

  std::vector<std::byte> Random(std::mt19937_64& rng, size_t count) const {
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& e : x) e = normal(rng);
    std::vector<std::byte> bytes(count * DTypeBytes(dtype));
    FromF32(x.data(), count, dtype, bytes.data());
    return bytes;
  }

  DType dtype;
  uint32_t dim, group;
  std::vector<std::byte> k, v;
  std::vector<float> queries;
  std::vector<PageView> views;
  std::vector<PageId> ids;
  TokenRows rows;
  PagedKv kv;
};

// Outputs and log-sum-exps of two states agree: f32 sums of a few hundred terms against float64.
inline void ExpectStatesNear(AttentionStates& actual, AttentionStates& expected, float tolerance) {
  ASSERT_EQ(actual.flat().size(), expected.flat().size());
  const uint32_t heads = expected.heads(), dim = expected.head_dim();
  std::vector<float> x(size_t{heads} * dim), y(size_t{heads} * dim);
  FinishStates(actual.ref(), x.data());
  FinishStates(expected.ref(), y.data());
  for (size_t i = 0; i < x.size(); ++i)
    ASSERT_NEAR(x[i], y[i], tolerance) << "output element " << i;
  for (uint32_t h = 0; h < heads; ++h) {
    const float lse = LogSumExp(expected.ref(), h);
    if (expected.ref().denom[h] == 0) {
      EXPECT_EQ(actual.ref().denom[h], 0.0f);
    } else {
      ASSERT_NEAR(LogSumExp(actual.ref(), h), lse, tolerance * (1 + std::abs(lse))) << "head " << h;
    }
  }
}

}  // namespace icecache
