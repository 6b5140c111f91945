#include "cacheserver/select/layer_reuse.h"

#include <gtest/gtest.h>

#include <random>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 64, kTokens = 320;

// Two layers with the same text: their keys differ.
struct Layer {
  Layer(PolicyKind kind, uint32_t seed)
      : k(kTokens * kDim), policy(MakePolicy(kind, {DType::kF32, kDim, 1})) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (float& x : k) x = normal(rng);
    const auto* bytes = reinterpret_cast<const std::byte*>(k.data());
    EXPECT_TRUE(policy->Build({DType::kF32, kDim, kTokens, bytes, bytes}, {}).ok());
    for (uint32_t p = 0; p < kTokens / limits::kPageTokens; ++p) {
      const std::byte* at = bytes + size_t{p} * limits::kPageTokens * kDim * sizeof(float);
      views.push_back({at, at, limits::kPageTokens});
    }
  }
  PagedKv kv() const {
    return {DType::kF32, kDim, static_cast<uint32_t>(views.size()), views.data()};
  }
  std::vector<float> k;
  std::unique_ptr<SelectionPolicy> policy;
  std::vector<PageView> views;
};

TEST(LayerReuse, LayersBehindAFilterLayerGetItsPages) {
  for (const PolicyKind kind : {PolicyKind::kExactPage, PolicyKind::kOmniKv}) {
    const Layer filter(kind, 1), behind(kind, 2);
    LayerReuse reuse({0, 4});
    const std::vector<float> q(filter.k.begin() + 100 * kDim, filter.k.begin() + 101 * kDim);
    const SelectRequest request{.queries = q.data(), .group = 1, .max_pages = 3};
    Selection first, second, own;
    EXPECT_EQ(reuse.Select(1, *behind.policy, request, behind.kv(), &second).code(),
              StatusCode::kFailedPrecondition);
    ASSERT_TRUE(reuse.Select(0, *filter.policy, request, filter.kv(), &first).ok());
    ASSERT_TRUE(reuse.Select(1, *behind.policy, request, behind.kv(), &second).ok());
    ASSERT_EQ(second.pages.size(), 3u);
    EXPECT_EQ(second.tokens_read, 3 * limits::kPageTokens);
    // The query is a key of the filter layer: its page is chosen there, and so here.
    bool found = false;
    for (const SelectedPage& page : second.pages) found = found || page.page.value == 100 / 16;
    EXPECT_TRUE(found) << PolicyKindName(kind);
    // A new step's filter layer chooses again.
    ASSERT_TRUE(reuse.Select(4, *behind.policy, request, behind.kv(), &first).ok());
    SelectRequest plain = request;
    plain.residual = false;
    behind.policy->Select(plain, behind.kv(), &own);
    ASSERT_TRUE(reuse.Select(5, *filter.policy, request, filter.kv(), &second).ok());
    for (size_t i = 0; i < own.pages.size(); ++i)
      EXPECT_EQ(second.pages[i].page, own.pages[i].page);
  }
}

}  // namespace
}  // namespace icecache
