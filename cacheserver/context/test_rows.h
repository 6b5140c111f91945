// For tests of slices and contexts: rows that are a function of their position, and full attention
// over them in float64 as the truth.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "kernels/attention.h"
#include "kernels/distance.h"

namespace icecache {

// K and V of every position of one slice. Neighbours in position share a topic now and then, so
// that clusterings have something to find.
class TestRows {
 public:
  TestRows(uint64_t seed, DType dtype, uint32_t head_dim)
      : seed_(seed), dtype_(dtype), head_dim_(head_dim) {}

  // Rows [first, first + count); valid until the next call.
  TokenRows Rows(uint32_t first, uint32_t count) {
    Grow(first + count);
    const size_t row_bytes = RowBytes();
    return {dtype_, head_dim_, count, k_.data() + first * row_bytes, v_.data() + first * row_bytes};
  }
  std::span<const std::byte> K(uint32_t first, uint32_t count) {
    return {Rows(first, count).k, count * RowBytes()};
  }
  std::span<const std::byte> V(uint32_t first, uint32_t count) {
    return {Rows(first, count).v, count * RowBytes()};
  }
  size_t RowBytes() const { return size_t{head_dim_} * DTypeBytes(dtype_); }

  // Queries near the key of a random position.
  std::vector<float> Queries(uint64_t seed, uint32_t group, uint32_t tokens) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> noise(0, 0.3f);
    std::vector<float> queries(size_t{group} * head_dim_);
    std::vector<float> key(head_dim_);
    const TokenRows rows = Rows(0, std::max(tokens, 1u));
    ToF32(rows.k + rng() % rows.count * RowBytes(), dtype_, head_dim_, key.data());
    for (size_t i = 0; i < queries.size(); ++i) {
      queries[i] = (key[i % head_dim_] + noise(rng)) * 4 / std::sqrt(static_cast<float>(head_dim_));
    }
    return queries;
  }

  // Attention over positions [0, tokens), [group, head_dim].
  std::vector<float> FullAttention(const std::vector<float>& queries, uint32_t group,
                                   uint32_t tokens) {
    AttentionStates states(group, head_dim_);
    MakeReferenceAttention()->AttendRows(queries.data(), Rows(0, tokens), states.ref());
    std::vector<float> result(queries.size());
    FinishStates(states.ref(), result.data());
    return result;
  }

 private:
  void Grow(uint32_t count) {
    std::vector<float> row(head_dim_);
    for (; count_ < count; ++count_) {
      for (auto* store : {&k_, &v_}) {
        std::mt19937_64 rng(seed_ + count_ * 2 + (store == &v_));
        std::mt19937_64 topic_rng(seed_ ^ (count_ / 7 % 11 + 1) * 0x9e3779b97f4a7c15ull);
        std::normal_distribution<float> normal(0, 1), topic(0, 1);
        for (float& x : row) x = topic(topic_rng) + 0.5f * normal(rng);
        store->resize((count_ + 1) * RowBytes());
        FromF32(row.data(), head_dim_, dtype_, store->data() + count_ * RowBytes());
      }
    }
  }

  const uint64_t seed_;
  const DType dtype_;
  const uint32_t head_dim_;
  uint32_t count_ = 0;
  std::vector<std::byte> k_, v_;
};

// What a worker ends up with: `states` finished, compared with the truth.
inline void ExpectAttention(AttentionStates& states, const std::vector<float>& truth) {
  std::vector<float> result(truth.size());
  FinishStates(states.ref(), result.data());
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (result[i] - truth[i]) * (result[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  EXPECT_LE(std::sqrt(error), 1e-4 * std::sqrt(norm) + 1e-6);
}

}  // namespace icecache
