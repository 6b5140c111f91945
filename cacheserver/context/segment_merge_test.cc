// Merged segments: they are what one build of the same tokens would have made, and hold what a
// child starts with.
#include "cacheserver/context/segment_merge.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cacheserver/context/test_context.h"

namespace icecache {
namespace {

class SegmentMergeTest : public OneSliceTest {
 protected:
  static constexpr uint32_t kSegments = 4;

  // The run [first, first + count) of the chain as one segment.
  std::shared_ptr<const Segment> Merged(const Context& chain, size_t first, size_t count,
                                        SegmentId id = SegmentId(100)) {
    const auto begin = chain.chain().begin() + static_cast<ptrdiff_t>(first);
    SegmentMerge merge(pool_, {begin, begin + static_cast<ptrdiff_t>(count)}, id);
    while (!merge.done()) {
      Misses misses;
      auto job = merge.Prepare(&misses).value();
      KV_CHECK(misses.empty());
      job->Run();
      KV_CHECK(merge.Install(std::move(job)).ok());
    }
    return merge.Take();
  }
  void Merge(Context& chain, size_t first, size_t count) {
    const std::shared_ptr<const Segment> merged = Merged(chain, first, count);
    const SegmentId from = chain.chain()[first]->id(), to = chain.chain()[first + count - 1]->id();
    ASSERT_TRUE(chain.ReplaceRun(from, to, merged));
    const Status status = chain.Validate();
    ASSERT_TRUE(status.ok()) << status.ToString();
  }
  // One segment of the tokens of Chain(kSegments).
  std::unique_ptr<Context> One(PolicyKind policy, uint32_t tokens) {
    return Chain(1, policy, tokens);
  }
  static uint32_t TokensOf(const Context& context) { return context.sealed_ends()->end; }
};

// Not the name of the segment, and so not the checksums.
void ExpectSameAnswer(const wire::HeadSelection& a, const wire::HeadSelection& b) {
  ASSERT_EQ(a.pages.size(), b.pages.size());
  for (size_t i = 0; i < a.pages.size(); ++i) {
    EXPECT_EQ(a.pages[i].page, b.pages[i].page);
    EXPECT_EQ(a.pages[i].log_mass, b.pages[i].log_mass);
    ASSERT_EQ(a.pages[i].positions.size(), b.pages[i].positions.size());
    EXPECT_EQ(0, std::memcmp(a.pages[i].positions.data(), b.pages[i].positions.data(),
                             a.pages[i].positions.size()));
    EXPECT_EQ(0, std::memcmp(a.pages[i].k_rows.data(), b.pages[i].k_rows.data(),
                             a.pages[i].k_rows.size()));
    EXPECT_EQ(0, std::memcmp(a.pages[i].v_rows.data(), b.pages[i].v_rows.data(),
                             a.pages[i].v_rows.size()));
  }
  EXPECT_EQ(a.residual, b.residual);
  EXPECT_EQ(a.covered_mass, b.covered_mass);
}

TEST_F(SegmentMergeTest, AnswersAreThoseOfOneSegmentOfTheSameTokens) {
  for (const PolicyKind policy :
       {PolicyKind::kClusterTree, PolicyKind::kDciTree, PolicyKind::kExact, PolicyKind::kSequential,
        PolicyKind::kQuest}) {
    SCOPED_TRACE(std::string(PolicyKindName(policy)));
    const auto chain = Chain(kSegments, policy);
    const auto one = One(policy, TokensOf(*chain));
    Merge(*chain, 0, kSegments);
    ASSERT_EQ(chain->segment_count(), 1u);
    EXPECT_EQ(chain->sealed_ends(), one->sealed_ends());
    for (uint64_t seed = 0; seed < 8; ++seed) {
      queries_ = rows_.Queries(seed, kGroup, TokensOf(*one));
      ExpectSameAnswer(AskWithin(*chain, 6, 512), AskWithin(*one, 6, 512));
    }
  }
}

TEST_F(SegmentMergeTest, ItSelectsBetterThanTheChainDid) {
  const auto chain = Chain(8), merged = Chain(8);
  Merge(*merged, 0, 8);
  double of_chain = 0, of_merged = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    queries_ = rows_.Queries(seed, kGroup, TokensOf(*chain));
    const auto mass = [&](const Context& context) {
      return (*context.CheckSelection(kLayer, kHead, queries_.data(), AskWithin(context, 6, 0)))
          ->mass;
    };
    of_chain += mass(*chain);
    of_merged += mass(*merged);
  }
  EXPECT_GT(of_merged, of_chain * 1.02);
}

TEST_F(SegmentMergeTest, AnyRunMergesAndNoTokenIsLostOrDoubled) {
  for (size_t first = 0; first < kSegments; ++first) {
    for (size_t count = 1; first + count <= kSegments; ++count) {
      const auto chain = Chain(kSegments);
      const uint32_t tokens = TokensOf(*chain);
      Merge(*chain, first, count);
      EXPECT_EQ(chain->segment_count(), kSegments - count + 1);
      EXPECT_EQ(TokensOf(*chain), tokens);
      std::vector<std::byte> k(tokens * rows_.RowBytes()), v(k.size());
      Misses misses;
      ASSERT_TRUE(chain->ReadRows(kLayer, kHead, {0, tokens, k.data(), v.data()}, &misses).ok());
      EXPECT_EQ(0, std::memcmp(k.data(), rows_.K(0, tokens).data(), k.size()));
      EXPECT_EQ(0, std::memcmp(v.data(), rows_.V(0, tokens).data(), v.size()));
      const wire::HeadSelection answer = AskWithin(*chain, 6, limits::kReadCapMax);
      const auto check = chain->CheckSelection(kLayer, kHead, queries_.data(), answer);
      ASSERT_TRUE(check.ok() && check->has_value());
      EXPECT_LT((*check)->output_error, 1e-4f);
    }
  }
}

// The window of the chain's last segment is that of the merged one, and a child goes on behind it.
TEST_F(SegmentMergeTest, AChildGoesOnWhereTheRunEnded) {
  const auto chain = Chain(kSegments);
  const uint32_t tail_first = chain->sealed_ends()->tail_first;
  Merge(*chain, 1, kSegments - 1);
  const RowsView tail = chain->FetchRows(kLayer, kHead, wire::RowsPart::kTail).value();
  EXPECT_EQ(tail.first_position, tail_first);
  EXPECT_EQ(tail.rows.count, kWindow);
  ContextSpec spec = chain->spec();
  spec.id = ContextId(50);
  spec.segment = SegmentId(50);
  const auto child = Context::Fork(*chain, spec).value();
  EXPECT_EQ(*child->NextPosition(kLayer, kHead), tail_first);
  ASSERT_TRUE(child
                  ->Append(kLayer, kHead, tail_first, kWindow, rows_.K(tail_first, kWindow),
                           rows_.V(tail_first, kWindow))
                  .ok());
  const auto check =
      child->CheckSelection(kLayer, kHead, queries_.data(), Ask(*child, 6, true)).value();
  EXPECT_LT(check->output_error, 1e-4f);
  EXPECT_TRUE(child->Validate().ok());
}

// A chain that grows while its sealed part is exchanged keeps what it has appended.
TEST_F(SegmentMergeTest, AGrowingChainKeepsItsPrivateSegment) {
  const auto parent = Chain(kSegments);
  ContextSpec spec = parent->spec();
  spec.id = ContextId(50);
  spec.segment = SegmentId(50);
  const auto child = Context::Fork(*parent, spec).value();
  const uint32_t first = *child->NextPosition(kLayer, kHead);
  ASSERT_TRUE(
      child->Append(kLayer, kHead, first, kWindow, rows_.K(first, kWindow), rows_.V(first, kWindow))
          .ok());
  const auto merged = Merged(*parent, 0, kSegments);
  ASSERT_TRUE(child->ReplaceRun(SegmentId(1), SegmentId(kSegments), merged));
  EXPECT_FALSE(child->sealed());
  EXPECT_EQ(child->segment_count(), 2u);
  EXPECT_TRUE(child->Validate().ok());
  const auto check =
      child->CheckSelection(kLayer, kHead, queries_.data(), Ask(*child, 6, true)).value();
  EXPECT_LT(check->output_error, 1e-4f);
  EXPECT_FALSE(child->ReplaceRun(SegmentId(1), SegmentId(kSegments), merged));  // gone already
  EXPECT_EQ(parent->segment_count(), kSegments);  // its own to exchange
}

TEST_F(SegmentMergeTest, WithoutMemoryNothingIsLeftOfIt) {
  const auto chain = Chain(kSegments);
  const uint64_t used = pool_.usage().frame_bytes + pool_.usage().row_bytes;
  pool_.SetQuota(TenantId(1), 1);
  {
    SegmentMerge merge(pool_, chain->chain(), SegmentId(100));
    Misses misses;
    EXPECT_EQ(merge.Prepare(&misses).status().code(), StatusCode::kResourceExhausted);
  }
  pool_.SetQuota(TenantId(1), 0);
  {
    SegmentMerge merge(pool_, chain->chain(), SegmentId(101));  // given up half-way
    Misses misses;
    auto job = merge.Prepare(&misses).value();
    job->Run();
  }
  EXPECT_EQ(pool_.usage().frame_bytes + pool_.usage().row_bytes, used);
  EXPECT_TRUE(pool_.Validate().ok());
  Merge(*chain, 0, kSegments);
  EXPECT_TRUE(pool_.Validate().ok());
}

}  // namespace
}  // namespace icecache
