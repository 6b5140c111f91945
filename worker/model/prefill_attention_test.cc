#include "worker/model/prefill_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace icecache {
namespace {

struct Inputs {
  ModelShape shape;
  std::vector<float> q, k, v;

  Inputs(const ModelShape& s, uint32_t tokens, float spread, uint64_t seed) : shape(s) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, spread);
    q.resize(size_t{tokens} * s.query_heads * s.head_dim);
    k.resize(size_t{tokens} * s.kv_heads * s.head_dim);
    v.resize(k.size());
    for (float& x : q) x = normal(random);
    for (float& x : k) x = normal(random);
    for (float& x : v) x = normal(random);
  }
};

// One output row by the definition, in double.
std::vector<double> Row(const Inputs& in, uint32_t token, uint32_t head) {
  const ModelShape& s = in.shape;
  const uint32_t kv_head = head / s.group();
  const float* q = &in.q[(size_t{token} * s.query_heads + head) * s.head_dim];
  std::vector<double> scores(token + 1);
  double max = -INFINITY;
  for (uint32_t t = 0; t <= token; ++t) {
    const float* k = &in.k[(size_t{t} * s.kv_heads + kv_head) * s.head_dim];
    for (uint32_t d = 0; d < s.head_dim; ++d) scores[t] += double{q[d]} * k[d];
    max = std::max(max, scores[t]);
  }
  std::vector<double> out(s.head_dim);
  double denominator = 0;
  for (uint32_t t = 0; t <= token; ++t) {
    const double weight = std::exp(scores[t] - max);
    denominator += weight;
    for (uint32_t d = 0; d < s.head_dim; ++d) {
      out[d] += weight * in.v[(size_t{t} * s.kv_heads + kv_head) * s.head_dim + d];
    }
  }
  for (double& x : out) x /= denominator;
  return out;
}

void ExpectRows(const Inputs& in, const std::vector<float>& out, uint32_t tokens) {
  for (uint32_t token = 0; token < tokens; token += (token > 20 && token + 20 < tokens) ? 13 : 1) {
    for (uint32_t head = 0; head < in.shape.query_heads; ++head) {
      const auto expected = Row(in, token, head);
      for (uint32_t d = 0; d < in.shape.head_dim; ++d) {
        ASSERT_NEAR(out[(size_t{token} * in.shape.query_heads + head) * in.shape.head_dim + d],
                    expected[d], 2e-5)
            << "token " << token << " head " << head << " dim " << d;
      }
    }
  }
}

TEST(PrefillAttention, EqualsTheDefinition) {
  const ModelShape shapes[] = {
      {1, 2, 8, 64, DType::kF16}, {1, 1, 5, 16, DType::kF16}, {1, 3, 3, 32, DType::kF16}};
  uint64_t seed = 1;
  for (const ModelShape& shape : shapes) {
    for (const uint32_t tokens : {1u, 2u, 63u, 257u, 700u}) {
      SCOPED_TRACE(testing::Message()
                   << shape.ToString() << ", " << tokens << " tokens, seed " << seed);
      const Inputs in(shape, tokens, 0.6f, seed++);
      std::vector<float> out(in.q.size(), NAN);
      ASSERT_TRUE(
          CausalAttention(shape, tokens, in.q.data(), in.k.data(), in.v.data(), 2, {}, out.data())
              .ok());
      ExpectRows(in, out, tokens);
    }
  }
}

TEST(PrefillAttention, LargeLogitsNeitherOverflowNorVanish) {
  const ModelShape shape{1, 2, 4, 64, DType::kF16};
  const Inputs in(shape, 600, 4.0f, 5);  // logits of several hundred
  std::vector<float> out(in.q.size());
  ASSERT_TRUE(
      CausalAttention(shape, 600, in.q.data(), in.k.data(), in.v.data(), 2, {}, out.data()).ok());
  for (const float x : out) ASSERT_TRUE(std::isfinite(x));
}

TEST(PrefillAttention, BlocksWithAPastEqualOneBlock) {
  const ModelShape shape{1, 2, 8, 32, DType::kF16};
  const uint32_t tokens = 530;
  const Inputs in(shape, tokens, 0.7f, 9);
  std::vector<float> out(in.q.size(), NAN);
  uint32_t past = 0;
  for (const uint32_t block : {256u, 1u, 200u, 73u}) {
    const size_t q_at = size_t{past} * shape.query_heads * shape.head_dim;
    const CausalBlock part{past,        block,       in.q.data() + q_at,
                           in.k.data(), in.v.data(), out.data() + q_at};
    ASSERT_TRUE(CausalAttention(shape, part, 3, {}).ok());
    past += block;
  }
  ASSERT_EQ(past, tokens);
  ExpectRows(in, out, tokens);
}

TEST(PrefillAttention, ResultDoesNotDependOnThreads) {
  const ModelShape shape{1, 2, 8, 64, DType::kF16};
  const Inputs in(shape, 400, 0.6f, 3);
  std::vector<float> one(in.q.size()), four(in.q.size());
  ASSERT_TRUE(
      CausalAttention(shape, 400, in.q.data(), in.k.data(), in.v.data(), 1, {}, one.data()).ok());
  ASSERT_TRUE(
      CausalAttention(shape, 400, in.q.data(), in.k.data(), in.v.data(), 4, {}, four.data()).ok());
  EXPECT_EQ(one, four);
}

// Progress comes from the calling thread alone: by itself it reports every tile; beside others, which
// may leave it none, at least the end.
TEST(PrefillAttention, ReportsRisingProgressUpToTheEnd) {
  const ModelShape shape{1, 2, 8, 16, DType::kF16};
  const Inputs in(shape, 900, 0.6f, 3);
  std::vector<float> out(in.q.size());
  for (const uint32_t threads : {1u, 2u, 4u}) {
    uint64_t last = 0, end = 0, calls = 0;
    const ProgressFn progress = [&](uint64_t done, uint64_t total) {
      EXPECT_GT(done, last);
      last = done, end = total, ++calls;
      return true;
    };
    ASSERT_TRUE(CausalAttention(shape, 900, in.q.data(), in.k.data(), in.v.data(), threads,
                                progress, out.data())
                    .ok());
    EXPECT_EQ(last, end);
    EXPECT_GT(end, 1u);
    if (threads == 1) {
      EXPECT_EQ(calls, end);
    }
  }
}

TEST(PrefillAttention, StopsWhenToldTo) {
  const ModelShape shape{1, 2, 8, 16, DType::kF16};
  const Inputs in(shape, 900, 0.6f, 3);
  std::vector<float> out(in.q.size());
  uint64_t calls = 0;
  const Status status = CausalAttention(
      shape, 900, in.q.data(), in.k.data(), in.v.data(), 1,
      [&](uint64_t, uint64_t) { return ++calls < 3; }, out.data());
  EXPECT_EQ(status.code(), StatusCode::kCancelled);
  EXPECT_EQ(calls, 3u);
}

TEST(PrefillAttention, RefusesShapesAndLengthsOutOfRange) {
  EXPECT_EQ(CausalAttention({1, 3, 8, 64, DType::kF16}, CausalBlock{}, 1, {}).code(),
            StatusCode::kInvalidArgument);
  const CausalBlock huge{limits::kContextTokensMax, 1, nullptr, nullptr, nullptr, nullptr};
  EXPECT_EQ(CausalAttention({1, 2, 8, 64, DType::kF16}, huge, 1, {}).code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
