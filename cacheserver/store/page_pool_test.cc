#include "cacheserver/store/page_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "cacheserver/store/row_buffer.h"

namespace icecache {
namespace {

constexpr uint64_t kExtent = limits::kExtentBytes;
constexpr uint32_t kFrame = 8256;  // head_dim 128, 16 bit
const TenantId kAlice(1), kBob(2);

std::vector<Frame> MustReserve(PagePool& pool, TenantId tenant, uint32_t bytes, uint32_t count) {
  std::vector<Frame> frames;
  const Status status = pool.Reserve(tenant, bytes, count, &frames);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return frames;
}

TEST(PagePool, TakesMemoryOnlyWhenNeededAndGivesItBack) {
  PagePool pool(4 * kExtent);
  EXPECT_EQ(pool.usage().held_bytes(), 0u);
  const std::vector<Frame> frames = MustReserve(pool, kAlice, kFrame, 10);
  EXPECT_EQ(pool.usage().extents, 1u);
  EXPECT_EQ(pool.usage(kAlice).frame_bytes, 10u * kFrame);
  pool.Release(kAlice, kFrame, frames);
  EXPECT_EQ(pool.usage().held_bytes(), 0u);
  EXPECT_TRUE(pool.tenants().empty());
}

TEST(PagePool, ExtentsBelongToOneTenantAndOneFrameSize) {
  PagePool pool(8 * kExtent);
  const auto a = MustReserve(pool, kAlice, kFrame, 1);
  const auto b = MustReserve(pool, kBob, kFrame, 1);
  const auto c = MustReserve(pool, kAlice, 4160, 1);
  EXPECT_NE(a[0].extent, b[0].extent);
  EXPECT_NE(a[0].extent, c[0].extent);
  EXPECT_EQ(pool.ExtentsOf(kAlice).size(), 2u);
  EXPECT_EQ(pool.ExtentsOf(kBob).size(), 1u);
  pool.Release(kAlice, kFrame, a);
  pool.Release(kBob, kFrame, b);
  pool.Release(kAlice, 4160, c);
}

TEST(PagePool, AnExtentIsFreshForItsNextTenant) {
  PagePool pool(kExtent);
  auto a = MustReserve(pool, kAlice, kFrame, 1);
  const uint64_t serial = pool.ExtentsOf(kAlice)[0].serial;
  std::memset(a[0].data, 0x5a, kFrame);
  pool.Release(kAlice, kFrame, a);
  const auto b = MustReserve(pool, kBob, kFrame, 1);
  for (uint32_t i = 0; i < kFrame; ++i) ASSERT_EQ(b[0].data[i], std::byte{0});
  EXPECT_NE(pool.ExtentsOf(kBob)[0].serial, serial);
  pool.Release(kBob, kFrame, b);
}

TEST(PagePool, OthersMapAnExtentReadOnly) {
  PagePool pool(kExtent);
  const auto a = MustReserve(pool, kAlice, kFrame, 1);
  const int fd = pool.ExtentsOf(kAlice)[0].fd;
  std::memcpy(a[0].data, "rows", 4);
  void* readable = mmap(nullptr, kExtent, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(readable, MAP_FAILED);
  EXPECT_EQ(std::memcmp(static_cast<std::byte*>(readable) + a[0].offset, "rows", 4), 0);
  munmap(readable, kExtent);
  void* writable = mmap(nullptr, kExtent, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  pool.Release(kAlice, kFrame, a);
  if (writable != MAP_FAILED) {
    munmap(writable, kExtent);
    GTEST_SKIP() << "this kernel has no F_SEAL_FUTURE_WRITE";
  }
}

TEST(PagePool, RefusalNamesThePoolAndChangesNothing) {
  PagePool pool(2 * kExtent);
  const uint32_t per_extent = kExtent / kFrame;
  auto held = MustReserve(pool, kAlice, kFrame, per_extent + 1);
  std::vector<Frame> more;
  const Status status = pool.Reserve(kAlice, kFrame, per_extent, &more);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("16MiB of 16MiB"), std::string::npos) << status.ToString();
  EXPECT_NE(status.message().find("--memory-size"), std::string::npos);
  EXPECT_TRUE(more.empty());
  EXPECT_EQ(pool.usage(kAlice).frames, per_extent + 1);
  EXPECT_TRUE(pool.Validate().ok());
  pool.Release(kAlice, kFrame, held);
}

TEST(PagePool, QuotaCountsExtentsAndRows) {
  PagePool pool(16 * kExtent);
  pool.SetQuota(kAlice, 2 * kExtent);
  ASSERT_TRUE(pool.ReserveBytes(kAlice, kExtent / 2).ok());
  const auto frames = MustReserve(pool, kAlice, kFrame, 1);
  std::vector<Frame> more;
  const Status status = pool.Reserve(kAlice, kFrame, kExtent / kFrame, &more);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("tenant 1"), std::string::npos) << status.ToString();
  EXPECT_EQ(pool.ReserveBytes(kAlice, kExtent / 2 + 1).code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(pool.ReserveBytes(kAlice, kExtent / 2).ok());
  EXPECT_EQ(pool.usage(kAlice).held_bytes(), 2 * kExtent);
  EXPECT_TRUE(pool.ReserveBytes(kBob, kExtent).ok()) << "another tenant's quota";
  pool.ReleaseBytes(kAlice, kExtent);
  pool.ReleaseBytes(kBob, kExtent);
  pool.Release(kAlice, kFrame, frames);
}

TEST(PagePool, AnEmptyExtentOfOneTenantMakesRoomForAnother) {
  PagePool pool(2 * kExtent);
  const uint32_t per_extent = kExtent / kFrame;
  auto held = MustReserve(pool, kAlice, kFrame, per_extent + 1);
  pool.Release(kAlice, kFrame, std::span(held).last(1));
  EXPECT_EQ(pool.usage(kAlice).extents, 2u) << "one empty extent is kept at hand";
  const auto b = MustReserve(pool, kBob, kFrame, 1);
  EXPECT_EQ(pool.usage(kAlice).extents, 1u);
  pool.Release(kAlice, kFrame, std::span(held).first(per_extent));
  pool.Release(kBob, kFrame, b);
}

TEST(PagePool, AReleasedFrameWaitsForThePinsThatCoverIt) {
  PagePool pool(kExtent);
  auto frames = MustReserve(pool, kAlice, kFrame, 2);
  auto first = pool.Pin();
  pool.Release(kAlice, kFrame, std::span(frames).first(1));
  auto second = pool.Pin();
  EXPECT_EQ(pool.usage().waiting_frames, 1u);
  pool.Release(kAlice, kFrame, std::span(frames).last(1));
  EXPECT_EQ(pool.usage().waiting_frames, 2u);
  second.reset();
  EXPECT_EQ(pool.usage().waiting_frames, 2u) << "the older pin covers both";
  first.reset();
  EXPECT_EQ(pool.usage().waiting_frames, 0u);
  EXPECT_EQ(pool.usage().held_bytes(), 0u);
}

TEST(PagePool, APinTakenAfterAReleaseDoesNotHoldTheFrame) {
  PagePool pool(kExtent);
  auto frames = MustReserve(pool, kAlice, kFrame, 1);
  auto before = pool.Pin();
  pool.Release(kAlice, kFrame, frames);
  auto after = pool.Pin();
  before.reset();
  EXPECT_EQ(pool.usage().frames, 0u);
}

TEST(PagePool, PinsMayBeDroppedOnAnotherThread) {
  PagePool pool(kExtent);
  auto frames = MustReserve(pool, kAlice, kFrame, 1);
  frames[0].data[0] = std::byte{7};
  std::thread reader([pin = pool.Pin(), data = frames[0].data]() mutable {
    EXPECT_EQ(data[0], std::byte{7});
    pin.reset();
  });
  pool.Release(kAlice, kFrame, frames);
  reader.join();
  EXPECT_EQ(pool.usage().frames, 0u);
}

TEST(PagePoolDeathTest, AFrameReleasedTwiceEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        PagePool pool(kExtent);
        auto frames = MustReserve(pool, kAlice, kFrame, 2);
        pool.Release(kAlice, kFrame, std::span(frames).first(1));
        pool.Release(kAlice, kFrame, std::span(frames).first(1));
      },
      "in_use");
}

// Who holds which frame, with a mark at both ends of each.
class PoolModel {
 public:
  PoolModel(PagePool& pool, uint64_t seed) : pool_(pool), rng_(seed) {}

  void Step() {
    const TenantId tenant(static_cast<uint32_t>(rng_() % 3));
    switch (rng_() % 6) {
      case 0:
      case 1:
        return Reserve(tenant);
      case 2:
        return ReleaseSome();
      case 3:
      case 4:
        return MoveRowBytes(tenant);
      case 5:
        if (pins_.size() < 3) {
          pins_.emplace_back(pool_.Pin(), held_);
        } else {
          pins_.erase(pins_.begin() + static_cast<long>(rng_() % pins_.size()));
        }
        return;
    }
  }
  void CheckMarks() {
    for (const Held& h : held_) Check(h);
    for (const auto& [pin, seen] : pins_) {
      for (const Held& h : seen) Check(h);
    }
    EXPECT_EQ(pool_.usage().frames, held_.size() + pool_.usage().waiting_frames);
  }
  void GiveEverythingBack() {
    for (const Held& h : held_) pool_.Release(h.tenant, h.bytes, {&h.frame, 1});
    for (const auto& [tenant, amount] : rows_) pool_.ReleaseBytes(tenant, amount);
    pins_.clear();
  }

 private:
  struct Held {
    TenantId tenant;
    uint32_t bytes;
    Frame frame;
    uint64_t mark;
  };

  void Reserve(TenantId tenant) {
    const uint32_t bytes = rng_() % 2 == 0 ? 64 * 1024 : 40 * 1024 + 64;
    const auto count = static_cast<uint32_t>(1 + rng_() % 90);
    std::vector<Frame> frames;
    const bool ok = pool_.Reserve(tenant, bytes, count, &frames).ok();
    ASSERT_EQ(frames.size(), ok ? count : 0);
    for (const Frame& frame : frames) {
      held_.push_back({tenant, bytes, frame, next_mark_++});
      std::memcpy(frame.data, &held_.back().mark, 8);
      std::memcpy(frame.data + bytes - 8, &held_.back().mark, 8);
    }
  }
  void ReleaseSome() {
    for (size_t n = rng_() % 80; n > 0 && !held_.empty(); --n) {
      std::swap(held_[rng_() % held_.size()], held_.back());
      pool_.Release(held_.back().tenant, held_.back().bytes, {&held_.back().frame, 1});
      held_.pop_back();
    }
  }
  void MoveRowBytes(TenantId tenant) {
    uint64_t& rows = rows_[tenant];
    if (rng_() % 2 == 0) {
      const uint64_t amount = rng_() % (kExtent / 2);
      if (pool_.ReserveBytes(tenant, amount).ok()) rows += amount;
    } else if (rows > 0) {
      const uint64_t amount = rng_() % (rows + 1);
      pool_.ReleaseBytes(tenant, amount);
      rows -= amount;
    }
  }
  static void Check(const Held& h) {
    uint64_t head = 0, tail = 0;
    std::memcpy(&head, h.frame.data, 8);
    std::memcpy(&tail, h.frame.data + h.bytes - 8, 8);
    ASSERT_EQ(head, h.mark);
    ASSERT_EQ(tail, h.mark);
  }

  PagePool& pool_;
  std::mt19937_64 rng_;
  std::vector<Held> held_;
  std::vector<std::pair<std::shared_ptr<const void>, std::vector<Held>>> pins_;
  std::map<TenantId, uint64_t> rows_;
  uint64_t next_mark_ = 1;
};

// Frames never overlap, keep what was written while held or pinned, and the ledger adds up after
// every step.
TEST(PagePool, RandomOperationsAgreeWithAModel) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  PagePool pool(6 * kExtent);
  pool.SetQuota(TenantId(2), 3 * kExtent);
  PoolModel model(pool, seed);
  for (int step = 0; step < 2000 && !testing::Test::HasFailure(); ++step) {
    model.Step();
    const Status valid = pool.Validate();
    ASSERT_TRUE(valid.ok()) << valid.ToString() << " at step " << step;
    EXPECT_LE(pool.usage(TenantId(2)).held_bytes(), 3 * kExtent);
    if (step % 50 == 0) model.CheckMarks();
  }
  model.GiveEverythingBack();
  EXPECT_EQ(pool.usage().held_bytes(), 0u);
  EXPECT_TRUE(pool.Validate().ok());
}

TEST(RowBuffer, GrowthIsChargedAndRefusalLeavesTheRows) {
  PagePool pool(kExtent);
  pool.SetQuota(kAlice, 64 * 1024);
  {
    RowBuffer buffer(pool, kAlice, DType::kF16, 64);  // 256 bytes per token
    std::vector<std::byte> k(100 * 128, std::byte{1}), v(100 * 128, std::byte{2});
    const TokenRows rows{DType::kF16, 64, 100, k.data(), v.data()};
    ASSERT_TRUE(buffer.Write(0, rows).ok());
    EXPECT_EQ(pool.usage(kAlice).row_bytes, buffer.charged_bytes());
    ASSERT_TRUE(buffer.Write(100, rows).ok());
    EXPECT_EQ(buffer.Write(200, rows).code(), StatusCode::kResourceExhausted);
    EXPECT_EQ(buffer.count(), 200u);
    ASSERT_TRUE(buffer.Reserve(256).ok())
        << "the growth reserve is given up before the row is refused";
    EXPECT_EQ(pool.usage(kAlice).row_bytes, 64u * 1024);
    EXPECT_EQ(buffer.rows(199, 1).v[127], std::byte{2});
    buffer.DropFront(150);
    EXPECT_EQ(buffer.count(), 50u);
    EXPECT_EQ(buffer.rows().k[0], std::byte{1});
  }
  EXPECT_EQ(pool.usage().held_bytes(), 0u);
}

}  // namespace
}  // namespace icecache
