// One shard over a cold store in memory: what is evicted comes back and answers the same; a broken
// or full store spoils nothing else; and whatever happens, the ledger adds up to the byte.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "cacheserver/store/cold_keys.h"
#include "cacheserver/test_tier.h"

namespace icecache::tier_test {
namespace {

class TierTest : public TierFixture {
 protected:
  // Of segments [first, first + count) of the context's chain; exchanged in all chains, or dropped.
  Status Merge(ContextId id, size_t first, size_t count, bool exchange = true) {
    std::vector<SegmentId> run;
    for (size_t i = first; i < first + count; ++i)
      run.push_back(shard_->FindContext(id)->chain()[i]->id());
    const SegmentId merged(next_++);
    std::optional<Status> built;
    shard_->MergeSegments(id, run, merged, [&](const Status& status) { built = status; });
    EXPECT_TRUE(Until([&] { return built.has_value(); }));
    const Status status = built.value_or(Internal("no answer"));
    if (status.ok() && exchange) {
      shard_->ReplaceRun(run.front(), run.back(), merged);
    } else {
      shard_->DropMerge(merged);
    }
    return status;
  }
  // `segments` of `each` tokens, each a fork of the one before, which is dropped.
  ContextId Chain(uint32_t segments, uint32_t each) {
    ContextId id = Sealed(each);
    for (uint32_t i = 1; i < segments; ++i) {
      const ContextId child(next_++);
      EXPECT_TRUE(Fork(id, child).ok());
      EXPECT_TRUE(Put(child, i * each - kWindow, each + kWindow).ok());
      EXPECT_TRUE(Build(child, each + kWindow).ok());
      EXPECT_TRUE(Seal(child).ok());
      shard_->DropContext(id);
      id = child;
    }
    return id;
  }
};

TEST_F(TierTest, EvictedPagesComeBackAndEveryPolicyAnswersTheSame) {
  Open(64u << 20);
  for (const PolicyKind policy :
       {PolicyKind::kClusterTree, PolicyKind::kDciTree, PolicyKind::kExact, PolicyKind::kSequential,
        PolicyKind::kQuest}) {
    SCOPED_TRACE(std::string(PolicyKindName(policy)));
    const ContextId id = Sealed(3000, policy);
    std::vector<Answer> warm;
    for (uint64_t seed = 0; seed < 8; ++seed) warm.push_back(Select(id, 0, seed, 3000));
    ASSERT_TRUE(Store(id).ok());
    for (uint64_t seed = 0; seed < 8; ++seed) {
      EvictAll(id);
      const Answer cold = Select(id, 0, seed, 3000);
      EXPECT_TRUE(cold.status.ok()) << cold.status.ToString();
      EXPECT_EQ(cold.text, warm[seed].text);
      EXPECT_GT(cold.rounds, 0);
      EXPECT_EQ(Select(id, 0, seed, 3000).rounds, 0);  // it stays
    }
    EXPECT_TRUE(shard_->FindContext(id)->Validate().ok());
    shard_->DropContext(id);
  }
}

TEST_F(TierTest, MemoryForAQuarterOfTheContextsHoldsThemAll) {
  Open(16u << 20);
  std::vector<ContextId> ids;
  for (int i = 0; i < 8; ++i) {  // 4 MB each, two extents
    ids.push_back(Create());
    const ContextId id = ids.back();
    Status status = Put(id, 0, 8000);
    for (int tries = 0; !status.ok() && tries < 100; ++tries) {
      std::optional<bool> room;
      shard_->tier().WaitForRoom([&](bool r) { room = r; });
      ASSERT_TRUE(Until([&] { return room.has_value(); }));
      status = Put(id, 0, 8000);
    }
    ASSERT_TRUE(status.ok()) << status.ToString();
    ASSERT_TRUE(Build(id, 8000).ok());
    ASSERT_TRUE(Seal(id).ok());
  }
  std::mt19937_64 random(3);
  std::map<std::pair<uint64_t, uint64_t>, std::string> known;
  for (int step = 0; step < 200; ++step) {
    const ContextId id = ids[random() % ids.size()];
    const uint64_t seed = random() % 3;
    const Answer answer = Select(id, 1, seed, 8000);
    ASSERT_TRUE(answer.status.ok()) << answer.status.ToString();
    const auto [it, fresh] = known.emplace(std::pair(id.value, seed), answer.text);
    EXPECT_TRUE(fresh || it->second == answer.text);
    ASSERT_TRUE(shard_->pool().Validate().ok());
  }
  EXPECT_GT(shard_->tier().usage().pages_cold, 0u);
}

TEST_F(TierTest, APageThatCannotBeReadIsAnErrorOfItsRequestAlone) {
  Open(64u << 20);
  const ContextId bad = Sealed(1000), good = Sealed(1000);
  const Answer warm = Select(good, 0, 1, 1000);
  ASSERT_TRUE(Store(bad).ok());
  ASSERT_TRUE(Store(good).ok());
  EvictAll(bad);
  EvictAll(good);
  const SegmentId segment = shard_->FindContext(bad)->chain().back()->id();
  for (uint32_t p = 0; p < 200; ++p) {  // other bytes of the right length, then none at all
    const std::string key = cold_keys::Page(segment, 0, PageId(p));
    const auto stored = cold_->store().Get(ColdColumn::kPages, key);
    if (!stored.ok() || !stored->has_value()) break;
    ColdWrite write{ColdColumn::kPages, key, **stored};
    write.value[5] ^= 1;
    ASSERT_TRUE(cold_->store().Put({&write, 1}, false).ok());
  }
  EXPECT_EQ(Select(bad, 0, 1, 1000).status.code(), StatusCode::kDataLoss);
  ASSERT_TRUE(
      cold_->store().DeletePrefix(ColdColumn::kPages, cold_keys::SegmentPrefix(segment)).ok());
  EXPECT_EQ(Select(bad, 1, 1, 1000).status.code(), StatusCode::kDataLoss);
  const Answer cold = Select(good, 0, 1, 1000);
  EXPECT_TRUE(cold.status.ok());
  EXPECT_EQ(cold.text, warm.text);
}

TEST_F(TierTest, AFullDiskKeepsContextsInMemoryAndSaysSo) {
  Open(64u << 20);
  const ContextId id = Sealed(1000);
  fault_ = [](std::string_view operation) {
    return operation == "put" ? ResourceExhausted("disk full") : OkStatus();
  };
  EXPECT_EQ(Store(id).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(metrics_.GetGauge("icecache_cold_store_degraded", "").value(), 1);
  EXPECT_TRUE(Select(id, 0, 1, 1000).status.ok());
  std::optional<bool> room;
  shard_->tier().WaitForRoom([&](bool r) { room = r; });
  EXPECT_EQ(room, false);  // at once: nothing can be stored now
  fault_ = {};
  EXPECT_TRUE(Store(id).ok());
  EXPECT_EQ(metrics_.GetGauge("icecache_cold_store_degraded", "").value(), 0);
}

// Asking for the copy's frames evicts, but never what is being copied: its pages are stored, and
// used by nobody else.
TEST_F(TierTest, AForkAtATokenAndAMergeKeepWhatTheyCopyInMemory) {
  constexpr uint32_t kEach = 3000;
  Open(32u << 20);
  const ContextId id = Chain(2, kEach);
  const auto fill = [&] {  // with what is stored, and so may go
    for (int i = 0; i < 12; ++i) ASSERT_TRUE(Store(Sealed(6000)).ok());  // 3 MB each
  };
  const std::string before = Select(id, 0, 1, 2 * kEach).text;
  for (const auto& segment : shard_->FindContext(id)->chain()) {
    std::optional<Status> stored;
    shard_->tier().Store(segment->id(), [&](const Status& status) { stored = status; });
    ASSERT_TRUE(Until([&] { return stored.has_value(); }));
  }
  fill();
  for (int i = 0; i < 4; ++i) {
    const ContextId child(next_++);
    const Status forked = ForkAt(id, child, 1, kEach + 500 + i * 500);
    ASSERT_TRUE(forked.ok()) << forked.ToString();
    const Status merged = Merge(id, 0, 2, false);
    ASSERT_TRUE(merged.ok()) << merged.ToString();
    ASSERT_TRUE(Seal(child).ok());
    ASSERT_TRUE(Store(child).ok());
    EXPECT_TRUE(Select(child, 0, 1, 2 * kEach).status.ok());
  }
  EXPECT_EQ(Select(id, 0, 1, 2 * kEach).text, before);
}

TEST_F(TierTest, AMergedSegmentIsStoredEvictedAndAnswersAsBefore) {
  Open(256u << 20);
  const ContextId id = Chain(4, 2000);
  ASSERT_TRUE(Store(id).ok());
  EvictAll(id);  // of its last segment: what is merged may be on disk
  const Status merged = Merge(id, 0, 4);
  ASSERT_TRUE(merged.ok()) << merged.ToString();
  ASSERT_EQ(shard_->FindContext(id)->chain().size(), 1u);
  EXPECT_TRUE(shard_->FindContext(id)->Validate().ok());
  const Answer warm = Select(id, 0, 1, 8000);
  ASSERT_TRUE(warm.status.ok());
  ASSERT_TRUE(Store(id).ok());
  EvictAll(id);
  const Answer cold = Select(id, 0, 1, 8000);
  EXPECT_GT(cold.rounds, 0);
  EXPECT_EQ(cold.text, warm.text);
}

// Without a cold store, nothing that others may need is taken for it.
TEST_F(TierTest, AMergeTakesOnlyMemoryToSpare) {
  Open(64u << 20);
  const ContextId id = Chain(2, 4000);  // 4 MB
  EXPECT_TRUE(Merge(id, 0, 2, false).ok());
  shard_->SetQuota(TenantId(0), 1);
  EXPECT_EQ(Merge(id, 0, 2).code(), StatusCode::kResourceExhausted);
  shard_->SetQuota(TenantId(0), 0);
  const ContextId large = Chain(2, 9000);  // more than an eighth
  EXPECT_EQ(Merge(large, 0, 2).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(shard_->FindContext(large)->chain().size(), 2u);
  EXPECT_TRUE(Merge(id, 0, 2).ok());
}

// Random life of contexts of three tenants, in memory that is too small for them.
class Ledger : public TierTest {
 protected:
  struct Living {
    ContextId id;
    uint32_t tokens = 0;
    bool sealed = false;
  };
  void Step() {
    const size_t at = living_.empty() ? 0 : random_() % living_.size();
    switch (living_.size() < 3 ? 0 : random_() % 8) {
      case 0:
        if (living_.size() < 12) living_.push_back({Create(random_() % 3)});
        return;
      case 1:  // a prefill of which some fail for want of memory
        if (living_[at].tokens > 0) return;
        living_[at].tokens = 100 + random_() % 6000;
        if (!Put(living_[at].id, 0, living_[at].tokens).ok() ||
            !Build(living_[at].id, living_[at].tokens).ok()) {
          Drop(at);
        }
        return;
      case 2:
        if (living_[at].tokens == 0 || living_[at].sealed) return;
        living_[at].sealed = Seal(living_[at].id).ok();
        return;
      case 3: {
        if (!living_[at].sealed) return;
        Living child{ContextId(next_++), living_[at].tokens, false};
        const Context& parent = *shard_->FindContext(living_[at].id);
        uint32_t tokens = 0;
        if (random_() % 2 == 0 && parent.chain().size() == 1) {
          tokens = child.tokens = 1 + random_() % parent.sealed_ends()->end;
        }
        if (Fork(living_[at].id, child.id, tokens, random_() % 3).ok()) living_.push_back(child);
        return;
      }
      case 4:
        if (living_[at].sealed) (void)Store(living_[at].id);
        return;
      case 5:
        if (living_[at].sealed) (void)Select(living_[at].id, 0, random_(), 100);
        return;
      case 6: {  // of segments of one tenant; built and given up, too
        const auto& chain = shard_->FindContext(living_[at].id)->chain();
        if (chain.size() < 2) return;
        const size_t first = random_() % (chain.size() - 1);
        if (chain[first]->spec().tenant != chain[first + 1]->spec().tenant) return;
        (void)Merge(living_[at].id, first, 2, random_() % 3 > 0);
        return;
      }
      default:
        if (random_() % 2 == 0) Drop(at);
    }
  }
  void Drop(size_t at) {
    shard_->DropContext(living_[at].id);
    living_.erase(living_.begin() + static_cast<ptrdiff_t>(at));
  }
  // Every tenant's account and every segment's own count, against the pool.
  void Check() {
    PagePool& pool = shard_->pool();
    ASSERT_TRUE(pool.Validate().ok()) << pool.Validate().ToString();
    uint64_t held = 0, used = 0;
    for (const TenantId tenant : pool.tenants()) {
      held += pool.usage(tenant).held_bytes();
      used += pool.usage(tenant).frame_bytes + pool.usage(tenant).row_bytes;
    }
    EXPECT_EQ(held, pool.usage().held_bytes());
    EXPECT_EQ(used, pool.usage().frame_bytes + pool.usage().row_bytes);
    std::vector<ContextId> ids;
    for (const Living& l : living_) ids.push_back(l.id);
    // A segment that is being stored outlives its context for that long.
    EXPECT_TRUE(Until([&] {
      uint64_t counted = 0;
      for (const auto& [id, bytes] : shard_->HoldingsOf(ids).segments) counted += bytes.kv_bytes;
      return counted == pool.usage().frame_bytes + pool.usage().row_bytes;
    }));
  }
  std::mt19937_64 random_;
  std::vector<Living> living_;
};

TEST_F(Ledger, AddsUpAfterAnySequenceOfOperations) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  random_.seed(seed);
  Open(48u << 20, 3);
  shard_->SetQuota(TenantId(2), 16u << 20);
  for (int step = 0; step < 300; ++step) {
    Step();
    Check();
    if (HasFatalFailure()) return;
  }
  while (!living_.empty()) Drop(0);
  EXPECT_TRUE(Until([&] { return shard_->pool().usage().held_bytes() == 0; }));
}

}  // namespace
}  // namespace icecache::tier_test
