#include "kernels/attention_state.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace icecache {
namespace {

constexpr uint32_t kHeads = 3;
constexpr uint32_t kDim = 32;

// A state that sums `terms` random terms of logit up to `scale`.
AttentionStates RandomState(std::mt19937_64& rng, int terms, float scale) {
  AttentionStates s(kHeads, kDim);
  std::normal_distribution<float> normal;
  std::vector<float> v(kDim);
  for (int t = 0; t < terms; ++t) {
    for (uint32_t h = 0; h < kHeads; ++h) {
      for (float& x : v) x = normal(rng);
      MergeTerm(scale * normal(rng), 1.0f, v.data(), s.ref(), h);
    }
  }
  return s;
}

void ExpectSame(AttentionStates& a, AttentionStates& b) {
  std::vector<float> x(kHeads * kDim), y(kHeads * kDim);
  FinishStates(a.ref(), x.data());
  FinishStates(b.ref(), y.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], y[i], 2e-5f);
  for (uint32_t h = 0; h < kHeads; ++h)
    EXPECT_NEAR(LogSumExp(a.ref(), h), LogSumExp(b.ref(), h),
                1e-4f * (1 + std::abs(LogSumExp(a.ref(), h))));
}

TEST(AttentionState, EmptyStateIsTheIdentity) {
  std::mt19937_64 rng(1);
  AttentionStates s = RandomState(rng, 5, 3.0f), copy = s, empty(kHeads, kDim);
  MergeStates(empty.ref(), s.ref());
  EXPECT_TRUE(std::equal(s.flat().begin(), s.flat().end(), copy.flat().begin()));
  MergeStates(s.ref(), empty.ref());
  EXPECT_TRUE(std::equal(s.flat().begin(), s.flat().end(), empty.flat().begin()));
}

TEST(AttentionState, EmptyStateFinishesAsZeros) {
  AttentionStates s(kHeads, kDim);
  std::vector<float> out(kHeads * kDim, 7.0f);
  FinishStates(s.ref(), out.data());
  for (const float x : out) EXPECT_EQ(x, 0.0f);
  EXPECT_EQ(LogSumExp(s.ref(), 0), kEmptyMax);
  AttentionStates both(kHeads, kDim);
  MergeStates(s.ref(), both.ref());  // empty + empty: no NaN from -inf - -inf
  EXPECT_EQ(both.ref().denom[0], 0.0f);
}

TEST(AttentionState, MergeIsAssociativeAndCommutative) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 rng(seed);
    const float scale = seed % 2 == 0 ? 2.0f : 60.0f;
    const AttentionStates a = RandomState(rng, 4, scale), b = RandomState(rng, 1, scale),
                          c = RandomState(rng, 9, scale);
    AttentionStates left = a, bc = b, right = a, swapped = c;
    AttentionStates b1 = b, c1 = c, a1 = a;
    MergeStates(b1.ref(), left.ref());
    MergeStates(c1.ref(), left.ref());
    MergeStates(c1.ref(), bc.ref());
    MergeStates(bc.ref(), right.ref());
    MergeStates(b1.ref(), swapped.ref());
    MergeStates(a1.ref(), swapped.ref());
    ExpectSame(left, right);
    ExpectSame(left, swapped);
  }
}

TEST(AttentionState, TermOfMassEqualsRepeatedTerm) {
  std::vector<float> v(kDim, 1.5f), w(kDim, -2.0f);
  AttentionStates once(kHeads, kDim), many(kHeads, kDim);
  for (uint32_t h = 0; h < kHeads; ++h) {
    MergeTerm(1.0f, 1.0f, w.data(), once.ref(), h);
    MergeTerm(1.0f, 1.0f, w.data(), many.ref(), h);
    MergeTerm(2.0f, 5.0f, v.data(), once.ref(), h);
    for (int i = 0; i < 5; ++i) MergeTerm(2.0f, 1.0f, v.data(), many.ref(), h);
  }
  ExpectSame(once, many);
}

TEST(AttentionState, TermOfNoMassChangesNothing) {
  std::mt19937_64 rng(3);
  AttentionStates s = RandomState(rng, 3, 1.0f), copy = s;
  std::vector<float> v(kDim, 1.0f);
  MergeTerm(100.0f, 0.0f, v.data(), s.ref(), 1);
  EXPECT_TRUE(std::equal(s.flat().begin(), s.flat().end(), copy.flat().begin()));
}

TEST(AttentionState, HugeLogitsStayFinite) {
  std::vector<float> v(kDim, 1.0f), w(kDim, 3.0f), out(kHeads * kDim);
  AttentionStates s(kHeads, kDim);
  MergeTerm(-1e30f, 1.0f, v.data(), s.ref(), 0);
  MergeTerm(1e30f, 1.0f, w.data(), s.ref(), 0);
  MergeTerm(-1e30f, 1.0f, v.data(), s.ref(), 0);
  FinishStates(s.ref(), out.data());
  EXPECT_EQ(out[0], 3.0f);
}

TEST(AttentionState, ResetReusesAndEmpties) {
  std::mt19937_64 rng(4);
  AttentionStates s = RandomState(rng, 3, 1.0f);
  s.Reset(2, 16);
  EXPECT_EQ(s.flat().size(), AttentionStates::FlatFloats(2, 16));
  EXPECT_EQ(s.ref().max[1], kEmptyMax);
  for (size_t i = 2; i < s.flat().size(); ++i) EXPECT_EQ(s.flat()[i], 0.0f);
}

}  // namespace
}  // namespace icecache
