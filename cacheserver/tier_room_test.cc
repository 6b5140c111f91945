// Who finds no memory waits for what may come free.
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <optional>
#include <vector>

#include "cacheserver/test_tier.h"

namespace icecache::tier_test {
namespace {

using TierRoom = TierFixture;

// Memory is full to the byte when the build has run, and what its sinks and tail need comes free by
// what is still on its way to the disk.
TEST_F(TierRoom, ABuildWhoseResultFindsNoRoomWaitsForThePagesThatAreBeingStored) {
  Open(40u << 20);
  std::promise<void> disk;
  fault_ = [ready = disk.get_future().share()](std::string_view operation) {
    if (operation == "put") ready.wait();
    return OkStatus();
  };
  for (int i = 0; i < 5; ++i) Sealed(8000);  // 3 extents of 8 MiB
  const ContextId id = Create(), other = Create();
  ASSERT_TRUE(Put(id, 0, 8000).ok());
  // With the five tails 8 MiB of rows; the pages of the build take the fourth extent.
  ASSERT_TRUE(Put(other, 0, 8384 - 5 * (kSinks + kWindow)).ok());
  std::vector<Status> ends;
  for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
    shard_->Build(id, kLayer, KvHeadId(head), 8000, {}, nullptr,
                  [&](const Result<uint32_t>& pages) { ends.push_back(pages.status()); });
  }
  const auto usage = [&] { return shard_->pool().usage(TenantId(0)); };
  EXPECT_TRUE(Until([&] { return usage().refused_by_memory > 0 || !ends.empty(); }));
  EXPECT_TRUE(ends.empty());
  EXPECT_EQ(usage().held_bytes(), 40u << 20);
  disk.set_value();
  EXPECT_TRUE(Until([&] { return ends.size() == kShape.kv_heads; }));
  for (const Status& end : ends) EXPECT_TRUE(end.ok()) << end.ToString();
  ASSERT_TRUE(shard_->pool().Validate().ok());
}

TEST_F(TierRoom, ThereMayBeRoomSoonWhileALoadHoldsPages) {
  Open(64u << 20);
  const ContextId id = Sealed(1000);
  ASSERT_TRUE(Store(id).ok());
  EvictAll(id);
  std::promise<void> disk;
  fault_ = [ready = disk.get_future().share()](std::string_view operation) {
    if (operation == "get") ready.wait();
    return OkStatus();
  };
  const std::shared_ptr<const Segment> segment = shard_->FindContext(id)->chain().back();
  Misses misses;
  misses.slices.push_back({segment, kLayer, KvHeadId(0), false, {PageId(0)}});
  std::optional<Status> loaded;
  shard_->tier().Load(misses, [&](const Status& status) { loaded = status; });
  const auto room = [&] {
    std::optional<bool> answer;
    shard_->tier().WaitForRoom([&](bool r) { answer = r; });
    EXPECT_TRUE(Until([&] { return answer.has_value(); }));
    return answer.value_or(false);
  };
  EXPECT_TRUE(room());
  EXPECT_FALSE(loaded.has_value());
  disk.set_value();
  EXPECT_TRUE(Until([&] { return loaded.has_value(); }));
  EXPECT_FALSE(room());
}

// Its last context is gone, and a reader holds it still.
TEST_F(TierRoom, ASegmentThatIsBeingDeletedIsNotWaitedFor) {
  Open(64u << 20);
  const ContextId id = Sealed(1000), next = Sealed(1000);
  std::promise<void> disk;
  fault_ = [ready = disk.get_future().share()](std::string_view operation) {
    if (operation == "delete") ready.wait();
    return OkStatus();
  };
  const auto segment = [&](ContextId of) { return shard_->FindContext(of)->chain().back()->id(); };
  cold_->DeleteSegment(segment(id));
  std::optional<bool> room;
  const auto wait = [&] {
    room.reset();
    shard_->tier().WaitForRoom([&](bool r) { room = r; });
    return Until([&] { return room.has_value(); });
  };
  EXPECT_TRUE(wait());
  EXPECT_EQ(room, true);
  EXPECT_TRUE(shard_->tier().Stored(segment(next)));
  EXPECT_TRUE(wait());
  EXPECT_EQ(room, false);
  disk.set_value();
}

}  // namespace
}  // namespace icecache::tier_test
