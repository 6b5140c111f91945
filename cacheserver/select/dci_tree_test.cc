#include "cacheserver/select/dci_tree.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 16;

std::vector<float> RandomRows(uint64_t seed, uint32_t count) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(size_t{count} * kDim);
  for (float& x : rows) x = normal(rng);
  return rows;
}

TokenRows RowsOf(const std::vector<float>& x) {
  const auto* bytes = reinterpret_cast<const std::byte*>(x.data());
  return {DType::kF32, kDim, static_cast<uint32_t>(x.size() / kDim), bytes, bytes};
}

std::map<std::string, double> Counters(const SelectionPolicy& policy) {
  std::map<std::string, double> counters;
  policy.VisitCounters(
      [&](std::string_view name, double value) { counters[std::string(name)] = value; });
  return counters;
}

// Pages in memory in the order of a layout.
struct Pages {
  Pages(const std::vector<float>& rows, const PageLayout& layout) : copy(rows.size()) {
    for (size_t i = 0; i < layout.tokens.size(); ++i)
      std::copy_n(rows.begin() + static_cast<ptrdiff_t>(size_t{layout.tokens[i]} * kDim), kDim,
                  copy.begin() + static_cast<ptrdiff_t>(i * kDim));
    for (uint32_t p = 0; p < layout.page_count(); ++p) {
      const auto* at =
          reinterpret_cast<const std::byte*>(copy.data() + size_t{layout.page_begin[p]} * kDim);
      views.push_back({at, at, layout.page_begin[p + 1] - layout.page_begin[p]});
    }
  }
  PagedKv kv() const {
    return {DType::kF32, kDim, static_cast<uint32_t>(views.size()), views.data()};
  }

  std::vector<float> copy;
  std::vector<PageView> views;
};

TEST(DciTree, LevelsHaveTheReferencesSizes) {
  // 131072 tokens: 129450, 1295, 260, 53, 11, 3 (notes/icecache.md section 1.2).
  auto policy = MakeDciTree({DType::kF32, kDim, 1});
  const std::vector<float> rows = RandomRows(1, 131072);
  ASSERT_TRUE(policy->Build(RowsOf(rows), {}).ok());
  const auto counters = Counters(*policy);
  EXPECT_EQ(counters.at("levels"), 6);
  EXPECT_NEAR(counters.at("pivots"), 1295 + 260 + 53 + 11 + 3, 4);
}

TEST(DciTree, LeavesOfACellAreEven) {
  auto policy = MakeDciTree({DType::kF32, kDim, 1});
  const std::vector<float> rows = RandomRows(2, 90);  // below the first pivot: one cell of 90
  const PageLayout layout = policy->Build(RowsOf(rows), {}).value();
  ASSERT_EQ(layout.page_count(), 6u);
  for (uint32_t p = 0; p < 6; ++p) EXPECT_EQ(layout.page_begin[p + 1] - layout.page_begin[p], 15u);
}

TEST(DciTree, AFullLeafSplitsIntoHalves) {
  auto policy = MakeDciTree({DType::kF32, kDim, 1});
  const std::vector<float> rows = RandomRows(3, 17);
  const std::vector<float> first(rows.begin(), rows.end() - kDim),
      last(rows.end() - kDim, rows.end());
  const PageLayout layout = policy->Build(RowsOf(first), {}).value();
  ASSERT_EQ(layout.page_count(), 1u);
  const InsertPlan plan = policy->Insert(RowsOf(last), Pages(first, layout).kv()).value();
  ASSERT_TRUE(plan.move.has_value());
  EXPECT_EQ(plan.move->from.value, 0u);
  EXPECT_EQ(plan.move->to.value, 1u);
  EXPECT_EQ(__builtin_popcount(plan.move->mask), 8);
  EXPECT_LE(plan.page.value, 1u);
}

TEST(DciTree, HeadsTakeTurnsByRank) {
  auto policy = MakeDciTree({DType::kF32, kDim, 1});
  const std::vector<float> rows = RandomRows(4, 400);
  const PageLayout layout = policy->Build(RowsOf(rows), {}).value();
  const Pages pages(rows, layout);
  const std::vector<float> queries = RandomRows(5, 2);
  const auto best = [&](const float* query, uint32_t group) {
    Selection got;
    policy->Select({.queries = query, .group = group, .max_pages = 4}, pages.kv(), &got);
    return got.pages;
  };
  const auto first = best(queries.data(), 1), second = best(queries.data() + kDim, 1);
  const auto both = best(queries.data(), 2);
  ASSERT_NE(first[0].page, second[0].page) << "choose another seed";
  EXPECT_EQ(both[0].page, first[0].page);
  EXPECT_EQ(both[1].page, second[0].page);
}

TEST(DciTree, TheAnchorShortcutChangesParentsAndStaysValid) {
  const std::vector<float> rows = RandomRows(6, 5000);
  auto plain = MakeDciTree({DType::kF32, kDim, 1}, DciTreeOptions::Improved());
  auto anchored = MakeDciTree({DType::kF32, kDim, 1});
  const PageLayout a = plain->Build(RowsOf(rows), {}).value();
  const PageLayout b = anchored->Build(RowsOf(rows), {}).value();
  EXPECT_NE(a.tokens, b.tokens);
  const Status status = anchored->Validate(Pages(rows, b).kv());
  EXPECT_TRUE(status.ok()) << status.ToString();
}

TEST(DciTree, LargeLevelsFindParentsWithABeam) {
  DciTreeOptions options = DciTreeOptions::Improved();
  options.exhaustive_parents = 10;  // so that small data takes the path of 300k tokens
  auto policy = MakeDciTree({DType::kF32, kDim, 1}, options);
  const std::vector<float> rows = RandomRows(7, 6000);
  const PageLayout layout = policy->Build(RowsOf(rows), {}).value();
  const Pages pages(rows, layout);
  ASSERT_TRUE(policy->Validate(pages.kv()).ok());
  const std::vector<float> row = RandomRows(8, 1);
  EXPECT_TRUE(policy->Insert(RowsOf(row), pages.kv()).ok());
}

}  // namespace
}  // namespace icecache
