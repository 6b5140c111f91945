// Which layout a ClusterTree takes when it may choose, by what its answers are worth.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/cluster_tree_slice.h"
#include "common/ids.h"
#include "kernels/distance.h"
#include "tests/support/page_store.h"

namespace icecache {
namespace {

constexpr uint32_t kCount = 2048, kDim = 64;

// As in heads of trained models: what neighbours have in common is much of their keys and nothing
// of their values, and values follow something that keys tell, too, but less of.
struct Text {
  explicit Text(uint64_t seed) : k(kCount * kDim * 2), v(kCount * kDim * 2) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> word(64 * size_t{kDim}), place(kDim), row(kDim);
    for (float& x : word) x = normal(rng);
    for (uint32_t t = 0; t < kCount; ++t) {
      if (t % 16 == 0) {
        for (float& x : place) x = normal(rng);
      }
      const float* meaning = word.data() + rng() % 64 * kDim;
      for (uint32_t j = 0; j < kDim; ++j)
        row[j] = place[j] + 0.7f * meaning[j] + 0.3f * normal(rng);
      FromF32(row.data(), kDim, DType::kF16, k.data() + size_t{t} * kDim * 2);
      for (uint32_t j = 0; j < kDim; ++j) row[j] = meaning[j] + 1.2f * normal(rng);
      FromF32(row.data(), kDim, DType::kF16, v.data() + size_t{t} * kDim * 2);
    }
  }
  TokenRows rows() const { return {DType::kF16, kDim, kCount, k.data(), v.data()}; }
  std::vector<std::byte> k, v;
};

struct Answer {
  bool in_order = false;
  double error = 0;  // of the output, mean over queries
};

Answer AskAll(const Text& text, Layout layout) {
  ClusterTreeOptions options;
  options.layout = layout;
  const auto policy = MakeClusterTree({DType::kF16, kDim, 3}, options);
  PageStore store(DType::kF16, kDim);
  const PageLayout pages = policy->Build(text.rows(), {}).value();
  KV_CHECK(store.ApplyLayout(text.rows(), pages).ok());
  Answer answer{std::is_sorted(pages.tokens.begin(), pages.tokens.end())};
  std::mt19937_64 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> q(4 * size_t{kDim});
  constexpr int kQueries = 12;
  for (int i = 0; i < kQueries; ++i) {
    for (float& x : q) x = 1.5f * normal(rng) / std::sqrt(static_cast<float>(kDim));
    answer.error += ErrorOf(store.kv(), q, Ask(*policy, store.kv(), q, 12, 512)).output / kQueries;
  }
  return answer;
}

// Sequential pages are the purer ones in keys, which sketches of all dimensions tell apart wherever
// they lie; pages by content have values more alike, and the smaller error.
TEST(ClusterTreeLayout, ValuesDecideWhereSketchesSayAllOfKeys) {
  for (const uint64_t seed : {1u, 2u}) {
    SCOPED_TRACE(seed);
    const Text text(seed);
    const Answer content = AskAll(text, Layout::kContentValue), best = AskAll(text, Layout::kAuto);
    const Answer in_order = AskAll(text, Layout::kSequential);
    EXPECT_LT(content.error, .9 * in_order.error);
    EXPECT_FALSE(best.in_order);
    EXPECT_EQ(best.error, content.error);
  }
}

}  // namespace
}  // namespace icecache
