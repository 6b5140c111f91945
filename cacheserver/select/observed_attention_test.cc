#include "cacheserver/select/observed_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 64, kTokens = 400, kGroup = 2;

// Random rows; value t is (t, 0, ...) so that an output says whom it attended to.
struct Rows {
  explicit Rows(uint32_t seed) : k(kTokens * kDim), v(k.size(), 0.0f) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (float& x : k) x = normal(rng);
    for (uint32_t t = 0; t < kTokens; ++t) v[t * kDim] = static_cast<float>(t);
  }
  TokenRows rows() const {
    return {DType::kF32, kDim, kTokens, reinterpret_cast<const std::byte*>(k.data()),
            reinterpret_cast<const std::byte*>(v.data())};
  }
  // A query group that looks at token t.
  std::vector<float> LookAt(uint32_t t) const {
    std::vector<float> q;
    for (uint32_t h = 0; h < kGroup; ++h)
      for (uint32_t j = 0; j < kDim; ++j) q.push_back(0.5f * k[t * kDim + j]);
    return q;
  }
  std::vector<float> k, v;
};

// Whether the page of `token` is among the four that hold most of what the policy keeps.
bool Keeps(PolicyKind kind, const Rows& rows, const std::vector<float>& seen, uint32_t token) {
  auto policy = MakePolicy(kind, {DType::kF32, kDim, 1});
  BuildHints hints;
  hints.queries = seen;
  hints.query_group = kGroup;
  const auto layout = policy->Build(rows.rows(), hints);
  EXPECT_TRUE(layout.ok());
  std::vector<PageView> views;
  for (uint32_t p = 0; p < layout->page_count(); ++p) {
    const size_t at = size_t{layout->page_begin[p]} * kDim * sizeof(float);
    views.push_back({rows.rows().k + at, rows.rows().v + at,
                     layout->page_begin[p + 1] - layout->page_begin[p]});
  }
  const std::vector<float> asked = rows.LookAt(3);
  Selection got;
  policy->Select({.queries = asked.data(), .group = kGroup, .max_pages = 4, .residual = false},
                 {DType::kF32, kDim, static_cast<uint32_t>(views.size()), views.data()}, &got);
  for (const SelectedPage& page : got.pages)
    if (page.page.value == token / limits::kPageTokens) return true;
  return false;
}

TEST(ObservedAttention, ScoresAreSharesOfTheQueriesSeen) {
  const Rows rows(1);
  std::vector<float> seen = rows.LookAt(10);
  const std::vector<float> second = rows.LookAt(200);
  seen.insert(seen.end(), second.begin(), second.end());
  BuildHints hints;
  hints.queries = seen;
  hints.query_group = kGroup;
  const std::vector<float> score = ObserveAttention(rows.rows(), hints, 32);
  EXPECT_NEAR(std::accumulate(score.begin(), score.end(), 0.0), 1.0, 1e-4);
  EXPECT_NEAR(score[10], 0.5, 0.05);
  EXPECT_NEAR(score[200], 0.5, 0.05);
  const std::vector<float> last = ObserveAttention(rows.rows(), hints, 1);
  EXPECT_LT(last[10], 0.05) << "only the last queries are of interest";
  EXPECT_NEAR(last[200], 1.0, 0.05);
  for (const float x : ObserveAttention(rows.rows(), {}, 32)) EXPECT_EQ(x, 0.0f);
}

TEST(ObservedAttention, PoliciesKeepWhatWasLookedAtAndForgetTheRest) {
  const Rows rows(2);
  for (const PolicyKind kind : {PolicyKind::kH2o, PolicyKind::kSnapKv}) {
    EXPECT_TRUE(Keeps(kind, rows, rows.LookAt(130), 130)) << PolicyKindName(kind);
    EXPECT_FALSE(Keeps(kind, rows, rows.LookAt(130), 290)) << PolicyKindName(kind);
  }
}

TEST(ObservedAttention, BrokenHintsAreRefused) {
  const Rows rows(3);
  std::vector<float> seen = rows.LookAt(10);
  BuildHints hints;
  hints.query_group = kGroup;
  hints.queries = std::span<const float>(seen).first(seen.size() - 1);
  EXPECT_EQ(MakePolicy(PolicyKind::kH2o, {DType::kF32, kDim, 1})
                ->Build(rows.rows(), hints)
                .status()
                .code(),
            StatusCode::kInvalidArgument);
  seen[5] = std::nanf("");
  hints.queries = seen;
  EXPECT_EQ(MakePolicy(PolicyKind::kH2o, {DType::kF32, kDim, 1})
                ->Build(rows.rows(), hints)
                .status()
                .code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
