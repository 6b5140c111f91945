#include "cacheserver/context/context_table.h"

#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/limits.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

constexpr TenantId kAlice{0}, kBob{1};

ContextTraits Traits() {
  return {.shape = {.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32},
          .model = "tiny",
          .sink_tokens = 4,
          .window_tokens = 16,
          .policy = PolicyKind::kExact};
}

TEST(ContextTable, NamesOfOneTenantAreUniqueAndHiddenFromOthers) {
  ContextTable table;
  ContextRecord doc = *table.Create(kAlice, "doc", Traits());
  EXPECT_EQ(table.Create(kAlice, "doc", Traits()).status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(table.FindByName(kBob, "doc"), nullptr);
  ContextRecord bobs = *table.Create(kBob, "doc", Traits());
  EXPECT_NE(bobs.id, doc.id);
  ASSERT_EQ(table.List(kAlice).size(), 1u);
  EXPECT_EQ(table.List(kAlice)[0].id, doc.id);
  EXPECT_EQ(table.ListAll().size(), 2u);
}

TEST(ContextTable, EmptyNameBecomesOneOfItsOwn) {
  ContextTable table;
  ContextRecord a = *table.Create(kAlice, "", Traits()), b = *table.Create(kAlice, "", Traits());
  EXPECT_NE(a.name, b.name);
  EXPECT_EQ(table.FindByName(kAlice, a.name)->id, a.id);
}

TEST(ContextTable, RefusesWhatNoContextCanBe) {
  ContextTable table;
  EXPECT_FALSE(table.Create(kAlice, "a\nb", Traits()).ok());
  EXPECT_FALSE(
      table.Create(kAlice, std::string(limits::kContextNameBytesMax + 1, 'x'), Traits()).ok());
  ContextTraits traits = Traits();
  traits.sink_tokens = limits::kSinkTokensMax + 1;
  EXPECT_THAT(table.Create(kAlice, "s", traits).status().message(), HasSubstr("sink_tokens"));
  traits = Traits();
  traits.shape.query_heads = 3;
  EXPECT_FALSE(table.Create(kAlice, "q", traits).ok());
  EXPECT_EQ(table.count(), 0u);
  EXPECT_EQ(table.segment_count(), 0u);
}

// The index would end the process: a client must not be able to ask for it.
TEST(ContextTable, RefusesHeadsTooSmallForTheIndex) {
  ContextTable table;
  ContextTraits traits = Traits();
  traits.policy = PolicyKind::kClusterTree;
  traits.shape.head_dim = 16;
  EXPECT_EQ(table.Create(kAlice, "doc", traits).status().code(), StatusCode::kInvalidArgument);
  traits.policy = PolicyKind::kExact;
  EXPECT_TRUE(table.Create(kAlice, "doc", traits).ok());
}

TEST(ContextTable, ForkSharesSealedSegmentsAndAddsOne) {
  ContextTable table;
  ContextRecord parent = *table.Create(kAlice, "doc", Traits());
  EXPECT_EQ(table.Fork(parent.id, "child", kAlice).status().code(), StatusCode::kFailedPrecondition);
  table.MarkSealed(parent.id, 100, 16);
  ContextRecord child = table.Fork(parent.id, "child", kAlice)->child;
  ASSERT_EQ(child.chain.size(), 2u);
  EXPECT_EQ(child.chain[0], parent.chain[0]);
  EXPECT_EQ(child.tokens, 100u);
  EXPECT_EQ(table.FindSegment(parent.chain[0])->references, 2u);
  EXPECT_EQ(table.FindSegment(parent.chain[0])->tokens(), 100u);
  EXPECT_TRUE(table.Validate().ok());

  EXPECT_EQ(table.Remove(parent.id)->size(), 0u);
  EXPECT_EQ(table.FindSegment(parent.chain[0])->references, 1u);
  table.MarkSealed(child.id, 130, 16);
  EXPECT_EQ(table.FindSegment(child.chain[1])->tokens(),
            46u);  // from position 84, the parent's tail, on
  EXPECT_TRUE(table.Validate().ok());
  EXPECT_EQ(table.Remove(child.id)->size(), 2u);
  EXPECT_FALSE(table.Remove(child.id));
  EXPECT_EQ(table.segment_count(), 0u);
}

TEST(ContextTable, PublishNeedsSeal) {
  ContextTable table;
  ContextRecord doc = *table.Create(kAlice, "doc", Traits());
  EXPECT_EQ(table.Publish(doc.id).code(), StatusCode::kFailedPrecondition);
  table.MarkSealed(doc.id, 10, 0);
  EXPECT_TRUE(table.Publish(doc.id).ok());
  EXPECT_TRUE(table.Publish(doc.id).ok());
  EXPECT_TRUE(table.Find(doc.id)->published);
  EXPECT_EQ(table.Publish(ContextId(999)).code(), StatusCode::kNotFound);
}

TEST(ContextTable, ChainsHaveAMaximum) {
  ContextTable table;
  ContextRecord last = *table.Create(kAlice, "", Traits());
  for (uint32_t i = 1; i < limits::kSegmentsPerContextMax; ++i) {
    table.MarkSealed(last.id, i, 0);
    last = table.Fork(last.id, "", kAlice)->child;
  }
  table.MarkSealed(last.id, limits::kSegmentsPerContextMax, 0);
  EXPECT_EQ(table.Fork(last.id, "", kAlice).status().code(), StatusCode::kResourceExhausted);
}

// A chain of segments that end at 100, 160 and 400, of sinks and window as Traits says.
ContextRecord ThreeSegments(ContextTable& table) {
  ContextRecord last = *table.Create(kAlice, "doc", Traits());
  for (const uint32_t end : {100u, 160u, 400u}) {
    if (end > 100) last = table.Fork(last.id, "to" + std::to_string(end), kAlice)->child;
    table.MarkSealed(last.id, end, Traits().window_tokens);
  }
  return *table.Find(last.id);
}

TEST(ContextTable, ForkAtTheEndOfASegmentSharesAllBeforeAndCutsNothing) {
  ContextTable table;
  const ContextRecord doc = ThreeSegments(table);
  const ForkPlan plan = *table.Fork(doc.id, "early", kBob, 160);
  EXPECT_EQ(plan.keep, 2u);
  EXPECT_FALSE(plan.cut);
  EXPECT_EQ(plan.child.tokens, 160u);
  EXPECT_EQ(plan.child.tail_tokens, Traits().window_tokens);
  EXPECT_EQ(plan.child.tenant, kBob);
  EXPECT_EQ(table.FindSegment(doc.chain[1])->references, 3u);
  EXPECT_EQ(table.FindSegment(plan.child.chain.back())->tenant, kBob);
  EXPECT_TRUE(table.Validate().ok());
}

TEST(ContextTable, ForkAtATokenCutsTheSegmentThatHoldsItsWindow) {
  ContextTable table;
  const ContextRecord doc = ThreeSegments(table);
  const uint32_t window = Traits().window_tokens, sinks = Traits().sink_tokens;
  for (const uint32_t tokens : {sinks, 50u, 99u, 101u, 159u, 161u, 399u}) {
    SCOPED_TRACE(tokens);
    const ForkPlan plan = *table.Fork(doc.id, "early", kAlice, tokens);
    ASSERT_TRUE(plan.cut);
    const uint32_t tail_first = std::max(std::min(sinks, tokens), tokens - std::min(window, tokens));
    EXPECT_EQ(plan.cut->tail_first, tail_first);
    EXPECT_EQ(plan.cut->end, tokens);
    // It begins where the segment that it is a part of begins, and its parent's next begins later.
    EXPECT_EQ(plan.cut->first, table.FindSegment(doc.chain[plan.keep])->first);
    EXPECT_LE(plan.cut->first, tail_first);
    if (plan.keep + 1 < doc.chain.size()) {
      EXPECT_GT(table.FindSegment(doc.chain[plan.keep + 1])->first, tail_first);
    }
    EXPECT_EQ(plan.child.chain.size(), plan.keep + 2);
    EXPECT_TRUE(table.Validate().ok());
    EXPECT_EQ(table.Remove(plan.child.id)->size(), 2u);
  }
  EXPECT_EQ(table.Fork(doc.id, "", kAlice, 0).status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(table.Fork(doc.id, "", kAlice, 401).status().code(), StatusCode::kOutOfRange);
}

TEST(ContextTable, StaysValidUnderRandomOperations) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  ContextTable table;
  std::vector<ContextId> living;
  for (int step = 0; step < 2000; ++step) {
    const TenantId tenant(random() % 2);
    const std::string name = "c" + std::to_string(random() % 20);
    const ContextId some = living.empty() ? ContextId(0) : living[random() % living.size()];
    switch (random() % 5) {
      case 0:
        if (auto made = table.Create(tenant, name, Traits()); made.ok()) living.push_back(made->id);
        break;
      case 1:
        if (auto made = table.Fork(some, name, tenant, random() % 120); made.ok()) {
          living.push_back(made->child.id);
        }
        break;
      case 2:
        if (const ContextRecord* c = table.Find(some); c != nullptr && !c->sealed) {
          table.MarkSealed(some, c->tokens + random() % 100, c->tokens == 0 ? 0 : c->tail_tokens);
        }
        break;
      case 3:
        (void)table.Publish(some).ok();
        break;
      case 4:
        if (table.Remove(some)) std::erase(living, some);
        break;
    }
    ASSERT_TRUE(table.Validate().ok()) << table.Validate().ToString();
    ASSERT_EQ(table.count(), living.size());
  }
  for (ContextId id : living) EXPECT_TRUE(table.Remove(id));
  EXPECT_EQ(table.segment_count(), 0u);
}

class MergeInTable : public ::testing::Test {
 protected:
  static constexpr uint32_t kEach = 1000, kTail = 16, kNoBound = 1u << 30;
  static bool Any(SegmentId) { return true; }

  // "c0" and forks "c1"... of it, all sealed and published.
  void MakeChain(uint32_t segments) {
    for (uint32_t i = 0; i < segments; ++i) {
      const ContextRecord made = i == 0 ? *table_.Create(kAlice, "c0", Traits())
                                        : table_.Fork(ids_.back(), Name(i), kAlice)->child;
      ids_.push_back(made.id);
      table_.MarkSealed(made.id, (i + 1) * kEach, kTail);
      ASSERT_TRUE(table_.Publish(made.id).ok());
    }
  }
  static std::string Name(uint32_t i) { return "c" + std::to_string(i); }
  const ContextRecord& Get(uint32_t i) { return *table_.FindByName(kAlice, Name(i)); }
  std::vector<SegmentId> MergeNext(SegmentId* merged) {
    const std::optional<MergeChoice> choice = table_.ChooseMerge(kNoBound, Any);
    KV_CHECK(choice.has_value());
    *merged = table_.NewSegmentId();
    const std::vector<SegmentId> freed = table_.Merge(choice->run, *merged);
    EXPECT_TRUE(table_.Validate().ok()) << table_.Validate().ToString();
    return freed;
  }

  ContextTable table_;
  std::vector<ContextId> ids_;
};

TEST_F(MergeInTable, AChainOfOneContextBecomesOneSegmentOfTheSameTokens) {
  MakeChain(4);
  const std::vector<SegmentId> chain = Get(3).chain;
  for (const uint32_t i : {0u, 1u, 2u}) (void)table_.Remove(ids_[i]);
  EXPECT_EQ(table_.HoldersOf(chain), std::vector<ContextId>{ids_[3]});
  SegmentId merged;
  EXPECT_EQ(MergeNext(&merged), chain);
  EXPECT_EQ(Get(3).chain, std::vector<SegmentId>{merged});
  EXPECT_EQ(Get(3).named_by, chain.back());  // its record on disk keeps its name
  const SegmentRecord segment = *table_.FindSegment(merged);
  EXPECT_EQ(segment.first, 0u);
  EXPECT_EQ(segment.end, 4 * kEach);
  EXPECT_EQ(segment.tail_first, 4 * kEach - kTail);
  EXPECT_EQ(segment.references, 1u);
  EXPECT_EQ(segment.merged, 4u);
  EXPECT_EQ(segment.copied_bytes, 0u);
  EXPECT_EQ(table_.segment_count(), 1u);
  EXPECT_FALSE(table_.ChooseMerge(kNoBound, Any).has_value());
  // A fork at a token that ended a segment is a cut now.
  const Result<ForkPlan> early = table_.Fork(ids_[3], "early", kAlice, 2 * kEach);
  ASSERT_TRUE(early.ok());
  EXPECT_TRUE(early->cut.has_value());
  EXPECT_TRUE(table_.Validate().ok());
}

TEST_F(MergeInTable, AllContextsThatHoldARunGetItAndOthersKeepWhatTheyHave) {
  MakeChain(4);
  (void)table_.Remove(ids_[0]);
  (void)table_.Remove(ids_[2]);
  const std::vector<SegmentId> chain = Get(3).chain;
  SegmentId merged;
  MergeNext(&merged);  // what c1 and c3 share
  EXPECT_EQ(Get(1).chain, std::vector<SegmentId>{merged});
  EXPECT_EQ(Get(3).chain, (std::vector<SegmentId>{merged, chain[2], chain[3]}));
  SegmentId behind;
  MergeNext(&behind);  // c3's own
  EXPECT_EQ(Get(3).chain, (std::vector<SegmentId>{merged, behind}));
  // Half of what is there would be held twice.
  EXPECT_FALSE(table_.ChooseMerge(kNoBound, Any).has_value());
  (void)table_.Remove(ids_[1]);
  MergeNext(&merged);
  EXPECT_EQ(Get(3).chain, std::vector<SegmentId>{merged});
  EXPECT_EQ(table_.FindSegment(merged)->merged, 4u);
}

// A growing child counts among those that hold the run, and keeps its own segment.
TEST_F(MergeInTable, AGrowingChildOfTheChainGoesWithIt) {
  MakeChain(3);
  (void)table_.Remove(ids_[0]);
  (void)table_.Remove(ids_[1]);
  const ForkPlan child = *table_.Fork(ids_[2], "child", kBob);
  SegmentId merged;
  EXPECT_EQ(MergeNext(&merged).size(), 3u);
  EXPECT_EQ(table_.Find(child.child.id)->chain,
            (std::vector<SegmentId>{merged, child.child.chain.back()}));
  EXPECT_EQ(table_.FindSegment(merged)->references, 2u);
  table_.MarkSealed(child.child.id, 3 * kEach + 900, kTail);
  EXPECT_FALSE(table_.ChooseMerge(kNoBound, Any).has_value());  // of another tenant, and small
}

TEST_F(MergeInTable, WhatIsHeldTwiceIsBoundedForEachTenant) {
  MakeChain(24);
  for (uint32_t i = 1; i + 1 < 24; ++i) (void)table_.Remove(ids_[i]);
  const std::vector<SegmentId> chain = Get(23).chain;
  SegmentId merged;
  // c0 stays, with a twenty-fourth.
  EXPECT_EQ(MergeNext(&merged).size(), 23u);
  EXPECT_EQ(Get(0).chain, std::vector<SegmentId>{chain[0]});
  EXPECT_EQ(table_.FindSegment(merged)->copied_bytes,
            (kEach - kTail) * Traits().shape.token_bytes());
  const auto none = [](SegmentId) { return false; };
  EXPECT_FALSE(table_.ChooseMerge(kNoBound, none).has_value());
}

}  // namespace
}  // namespace icecache
