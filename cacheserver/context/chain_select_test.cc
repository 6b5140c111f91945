// Selections over chains of segments of cluster_tree: later segments know what they must beat, and
// share one budget of reads.
#include <gtest/gtest.h>

#include <algorithm>

#include "cacheserver/context/test_context.h"

namespace icecache {
namespace {

class ChainSelect : public OneSliceTest {
 protected:
  static constexpr uint32_t kSegments = 8, kEach = 400, kPages = 12;

  // All sealed but for the sinks and the last window.
  std::unique_ptr<Context> Chain(uint32_t segments) {
    auto context = Make(1, PolicyKind::kClusterTree);
    for (uint32_t i = 0; i < segments; ++i) {
      if (i > 0) {
        ContextSpec spec = context->spec();
        spec.id = ContextId(1 + i);
        spec.segment = SegmentId(1 + i);
        context = Context::Fork(*context, spec).value();
      }
      const uint32_t first = *context->NextPosition(kLayer, kHead);
      KV_CHECK(
          context
              ->PutRows(kLayer, kHead, first, kEach, rows_.K(first, kEach), rows_.V(first, kEach))
              .ok());
      auto job = context->PrepareBuild(kLayer, kHead, kEach, {}).value();
      job->Run();
      KV_CHECK(context->Install(kLayer, kHead, std::move(job)).ok());
      KV_CHECK(context->Seal().ok());
    }
    queries_ = rows_.Queries(3, kGroup, segments * kEach / 2);
    return context;
  }
  wire::HeadSelection AskWithin(const Context& context, uint32_t pages, uint32_t read_cap) {
    SelectRequest request;
    request.queries = queries_.data();
    request.group = kGroup;
    request.max_pages = pages;
    request.read_cap = read_cap;
    wire::HeadSelection selection;
    Misses misses;
    EXPECT_TRUE(context.Select(kLayer, kHead, request, {}, &selection, &misses).ok());
    return selection;
  }
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
