// A whole server merges small segments in the background, and those who use the contexts see
// nothing of it but shorter chains.
#include "cacheserver/chain_merger.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cacheserver/test_chain.h"
#include "cacheserver/test_worker.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

constexpr uint32_t kEach = 300;

class ChainMergerTest : public ::testing::Test {
 protected:
  // Until the context is a chain of so many; meanwhile `turn` is done over and over.
  void WaitForChain(Worker& worker, const std::string& name, size_t segments,
                    const std::function<void()>& turn) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (SegmentsOf(worker, name).size() != segments) {
      ASSERT_LT(std::chrono::steady_clock::now(), limit)
          << SegmentsOf(worker, name).size() << " segments";
      ASSERT_TRUE(worker.control().Do(wire::Renew{}).ok());
      turn();
      if (HasFatalFailure()) return;
    }
  }
  void Open(Worker& worker, const std::string& name) {
    const auto grant = worker.control().Call<wire::Grant>(wire::Open{name});
    ASSERT_TRUE(grant.ok()) << grant.status().ToString();
    ASSERT_TRUE(worker.Attach(*grant).ok());
  }
  // Everything there is, exactly and under a small budget.
  void Check(Worker& worker, uint32_t tokens, uint64_t seed) {
    ForEachSlice([&](uint16_t layer, uint16_t head) {
      worker.CheckStep(layer, head, tokens, tokens - kWindow, 0, 1u << 10, seed);
      worker.CheckStep(layer, head, tokens, tokens - kWindow, 0, 2, seed + 1);
    });
  }

  RunningServer server_{test::TwoTenants()};
  Worker alice_{server_.address(), 7, "alice", "alice"};
  Worker bob_{server_.address(), 7, "bob", "bob"};
};

TEST_F(ChainMergerTest, AChainThatNobodyElseHoldsBecomesOneSegmentUnderItsReaders) {
  MakeChain(alice_, "doc", 4, kEach);
  for (const char* parent : {"doc.0", "doc.1", "doc.2"}) {
    ASSERT_TRUE(alice_.control().Do(wire::Drop{parent}).ok());
  }
  Open(alice_, "doc.3");
  const std::vector<wire::SegmentInfo> before = SegmentsOf(alice_, "doc.3");
  ASSERT_THAT(before, SizeIs(4));
  // A worker that holds pages by their old names.
  const std::vector<float> queries = alice_.rows(0, 0).Queries(3, kShape.group(), 4 * kEach);
  const auto old = alice_.Select(0, 0, queries, 4, 4 * kEach - kWindow, 0);
  ASSERT_TRUE(old.ok());
  std::vector<wire::ResidentPage> resident;
  for (const wire::PagePayload& page : old->reply.heads[0].pages) {
    resident.push_back({page.segment, page.page, page.version, page.fill});
  }
  uint64_t seed = 0;
  WaitForChain(alice_, "doc.3", 1, [&] { Check(alice_, 4 * kEach, seed += 2); });
  Check(alice_, 4 * kEach, 1000);

  const wire::SegmentInfo merged = SegmentsOf(alice_, "doc.3")[0];
  EXPECT_EQ(merged.tokens, 4 * kEach);
  EXPECT_EQ(merged.merged, 4u);
  EXPECT_GT(merged.id.value, before.back().id.value);  // no id comes twice
  const auto now = alice_.Select(0, 0, queries, 4, 4 * kEach - kWindow, 0, resident);
  ASSERT_TRUE(now.ok());
  for (const wire::PagePayload& page : now->reply.heads[0].pages) EXPECT_EQ(page.from, 0);
  // It goes on as any context: forked at its end and at a token of what was its second segment.
  ASSERT_TRUE(alice_.Fork("doc.3", "next").ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    alice_.CheckStep(layer, head, 4 * kEach + 1, 4 * kEach - kWindow + 1, 1, 1u << 10, 5);
  });
  ASSERT_TRUE(alice_.Fork({.parent = "doc.3", .name = "early", .tokens = kEach + 50}).ok());
  Check(alice_, kEach + 50, 9);
}

// What a parent that stays has of a run would be held twice: more than an eighth is not.
TEST_F(ChainMergerTest, SegmentsThatOthersHoldStay) {
  MakeChain(alice_, "doc", 4, kEach);
  ASSERT_TRUE(alice_.control().Do(wire::Drop{"doc.0"}).ok());
  ASSERT_TRUE(alice_.control().Do(wire::Drop{"doc.2"}).ok());
  Open(alice_, "doc.3");
  uint64_t seed = 0;
  WaitForChain(alice_, "doc.3", 2, [&] { Check(alice_, 4 * kEach, seed += 2); });
  WaitForChain(alice_, "doc.1", 1, [&] { Check(alice_, 4 * kEach, seed += 2); });
  const std::vector<wire::SegmentInfo> child = SegmentsOf(alice_, "doc.3");
  EXPECT_EQ(child[0].id, SegmentsOf(alice_, "doc.1")[0].id);
  EXPECT_EQ(child[0].references, 2u);
  Check(alice_, 4 * kEach, 1000);
  Open(alice_, "doc.1");
  Check(alice_, 2 * kEach, 2000);
}

// The owner's segments are merged for all who hold them, never with those of another tenant.
TEST_F(ChainMergerTest, TenantsKeepTheirOwnSegments) {
  MakeChain(alice_, "doc", 2, kEach, true);
  MakeChain(bob_, "mine", 2, kEach, false, {.parent = "doc.1", .owner = "alice"}, 2 * kEach);
  for (const char* parent : {"doc.0", "doc.1"}) {
    ASSERT_TRUE(alice_.control().Do(wire::Drop{parent}).ok());
  }
  ASSERT_TRUE(bob_.control().Do(wire::Drop{"mine.0"}).ok());
  Open(bob_, "mine.1");
  uint64_t seed = 0;
  WaitForChain(bob_, "mine.1", 2, [&] { Check(bob_, 4 * kEach, seed += 2); });
  std::vector<uint32_t> merged;
  for (const wire::SegmentInfo& segment : SegmentsOf(bob_, "mine.1")) {
    merged.push_back(segment.merged);
  }
  EXPECT_THAT(merged, ElementsAre(2, 2));
  Check(bob_, 4 * kEach, 1000);
}

}  // namespace
}  // namespace icecache
