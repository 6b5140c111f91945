// Selections over chains of segments of cluster_tree: later segments know what they must beat, and
// share one budget of reads.
#include <gtest/gtest.h>

#include <algorithm>

#include "cacheserver/context/test_context.h"

namespace icecache {
namespace {

class ChainSelect : public OneSliceTest {
 protected:
  static constexpr uint32_t kSegments = 8, kPages = 12;
};

TEST_F(ChainSelect, TheBestPagesOfAllSegmentsAreChosen) {
  const auto chain = Chain(kSegments);
  const wire::HeadSelection all = AskWithin(*chain, 1000, limits::kReadCapMax);
  const wire::HeadSelection few = AskWithin(*chain, kPages, limits::kReadCapMax);
  ASSERT_EQ(few.pages.size(), kPages);
  uint32_t same = 0;
  for (const wire::PagePayload& page : few.pages) {
    same += std::any_of(all.pages.begin(), all.pages.begin() + kPages, [&](const auto& p) {
      return p.segment == page.segment && p.page == page.page;
    });
  }
  // Within a segment the policy ranks by the sum over the group, so a few may differ.
  EXPECT_GE(same, kPages - 3);
  EXPECT_NEAR(all.covered_mass, 1, 1e-3);
}

TEST_F(ChainSelect, PagesAndResidualAreFullAttentionWhenAllMayBeRead) {
  const auto chain = Chain(kSegments);
  for (const uint32_t pages : {1u, 4u, kPages}) {
    const wire::HeadSelection answer = AskWithin(*chain, pages, limits::kReadCapMax);
    const auto check = chain->CheckSelection(kLayer, kHead, queries_.data(), answer);
    ASSERT_TRUE(check.ok() && check->has_value());
    EXPECT_LT((*check)->output_error, 1e-4f) << pages;
    EXPECT_NEAR((*check)->mass, answer.covered_mass, 1e-3) << pages;
  }
}

TEST_F(ChainSelect, LaterSegmentsReadOnlyWhatMayBeChosen) {
  const auto chain = Chain(kSegments), alone = Chain(1);
  const uint32_t one = AskWithin(*alone, kPages, 0).tokens_read;
  const uint32_t strict = AskWithin(*chain, kPages, 0).tokens_read;
  EXPECT_LE(one, kPages * limits::kPageTokens);
  EXPECT_LT(strict, kSegments * one * 3 / 4) << "as if every segment were alone";
  // What may be read beyond the pages is a budget of the chain, not of each segment.
  EXPECT_LE(AskWithin(*chain, kPages, 640).tokens_read, strict + 640);
}

}  // namespace
}  // namespace icecache
