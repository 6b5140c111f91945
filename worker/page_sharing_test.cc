// Two workers' caches on emulated devices that open each other's memory: what is copied is what was
// published, and whatever happens to a frame before or while it is copied costs a fetch.
#include "worker/page_sharing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "common/checksum.h"
#include "kernels/gpu/page_intake.h"
#include "worker/page_cache.h"

namespace icecache {
namespace {

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = 64, .dtype = DType::kF16};
constexpr SegmentId kSegment(7);

// Content is a function of the name.
struct Content {
  std::vector<std::byte> k, v;
  std::vector<uint32_t> positions;
};
Content ContentOf(uint32_t page, uint8_t fill) {
  Content content;
  std::mt19937 random(page);
  for (auto* rows : {&content.k, &content.v}) {
    rows->resize(fill * kShape.row_bytes());
    for (std::byte& b : *rows) b = static_cast<std::byte>(random());
  }
  for (uint32_t i = 0; i < fill; ++i) content.positions.push_back(page * 16 + i);
  return content;
}

class Worker {
 public:
  explicit Worker(uint32_t capacity) {
    cache_.emplace(kShape, capacity, arena_, sharing_.get(), 0);
    cache_->RetainSegments(std::span(&kSegment, 1));
  }

  PageSharing& sharing() { return *sharing_; }
  gpu::Device& device() { return *device_; }
  PageCache& cache() { return *cache_; }
  wire::SharedFrames named(uint64_t id) const {
    return {id, sharing_->offer().memory, sharing_->offer().directory};
  }

  // What a request would say is held.
  std::vector<uint32_t> Listed() {
    std::vector<wire::ResidentPage> resident;
    cache_->ListResident(&resident);
    std::vector<uint32_t> pages;
    for (const wire::ResidentPage& page : resident) pages.push_back(page.page.value);
    std::sort(pages.begin(), pages.end());
    return pages;
  }
  // The page as the server answers: with its content, or named only.
  PageCache::Outcome Apply(uint32_t id, bool held, uint8_t fill = 9) {
    const Content content = ContentOf(id, fill);
    wire::PagePayload page{kSegment, PageId(id), 1, fill, held ? fill : uint8_t{0}};
    page.checksum = PageChecksum({kSegment.value, id, 1}, content.k, content.v,
                                 std::as_bytes(std::span(content.positions)));
    if (!held) {
      page.k_rows = content.k;
      page.v_rows = content.v;
      page.positions = std::as_bytes(std::span(content.positions));
    }
    const PageCache::Outcome outcome = cache_->Apply(page, TokenPos(0), TokenPos(1u << 20));
    EXPECT_TRUE(intake_->Flush().ok());
    return outcome;
  }
  std::vector<PageCache::Damaged> Settle() {
    std::vector<PageCache::Damaged> damaged;
    EXPECT_TRUE(cache_->Settle(&damaged).ok());
    EXPECT_TRUE(cache_->Validate().ok());
    ExpectContent();
    return damaged;
  }
  void Fetch(uint32_t id) {
    cache_->BeginStep();
    EXPECT_EQ(Apply(id, false), PageCache::Outcome::kReceived);
    EXPECT_TRUE(Settle().empty());
  }
  // The page that is selected is what the server has (the emulator's memory is the process's).
  void ExpectContent() {
    if (cache_->selected().size() != 1) return;
    std::vector<uint32_t> positions;
    cache_->ListSelectedPositions(&positions);
    const PageView view = cache_->view().pages[cache_->selected()[0].value];
    const Content right = ContentOf(positions[0] / 16, view.fill);
    EXPECT_EQ(std::memcmp(view.k, right.k.data(), right.k.size()), 0);
    EXPECT_EQ(std::memcmp(view.v, right.v.data(), right.v.size()), 0);
    EXPECT_EQ(positions, right.positions);
  }

 private:
  const std::unique_ptr<gpu::Device> device_ = gpu::MakeEmulatedDevice({});
  gpu::DeviceFrames frames_{*device_};
  const std::unique_ptr<gpu::PageIntake> intake_ = gpu::PageIntake::Make(*device_).value();
  const std::unique_ptr<PageSharing> sharing_ =
      PageSharing::Make(*device_, frames_, kShape, 64 * kShape.page_bytes()).value();
  PageArena arena_{kShape.page_bytes(), &frames_, intake_.get()};
  std::optional<PageCache> cache_;
};

class PageSharingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
    taker_.sharing().SetOthers({giver_.named(1)});
    ASSERT_EQ(taker_.sharing().other_count(), 1u);
  }
  Worker giver_{3}, taker_{3};
};
using Pages = std::vector<uint32_t>;

TEST_F(PageSharingTest, APageThatAnotherHoldsIsListedAndCopied) {
  EXPECT_EQ(taker_.Listed(), Pages{});
  giver_.Fetch(4);
  giver_.Fetch(5);
  EXPECT_EQ(taker_.Listed(), (Pages{4, 5}));
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(4, true), PageCache::Outcome::kTaken);
  EXPECT_TRUE(taker_.Settle().empty());
  EXPECT_EQ(taker_.cache().page_count(), 1u);
  // It is resident from now on, and named once.
  EXPECT_EQ(taker_.Listed(), (Pages{4, 5}));
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(4, true), PageCache::Outcome::kHit);
  // And others find it here.
  Worker third(3);
  third.sharing().SetOthers({taker_.named(1)});
  EXPECT_EQ(third.Listed(), Pages{4});
  third.cache().BeginStep();
  EXPECT_EQ(third.Apply(4, true), PageCache::Outcome::kTaken);
  EXPECT_TRUE(third.Settle().empty());
}

TEST_F(PageSharingTest, PagesOfOtherSegmentsAreNotListed) {
  giver_.Fetch(4);
  const SegmentId other(8);
  taker_.cache().RetainSegments(std::span(&other, 1));
  EXPECT_EQ(taker_.Listed(), Pages{});
}

TEST_F(PageSharingTest, WhatIsGoneBeforeTheAnswerIsMissed) {
  giver_.Fetch(1);
  EXPECT_EQ(taker_.Listed(), Pages{1});
  for (uint32_t id = 2; id < 6; ++id) giver_.Fetch(id);  // three frames
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(1, true), PageCache::Outcome::kMissed);
  EXPECT_EQ(taker_.Apply(1, false), PageCache::Outcome::kReceived);
  EXPECT_TRUE(taker_.Settle().empty());
}

TEST_F(PageSharingTest, WhatIsReplacedWhileItIsCopiedIsNotUsed) {
  giver_.Fetch(1);
  EXPECT_EQ(taker_.Listed(), Pages{1});
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(1, true), PageCache::Outcome::kTaken);  // queued, not yet copied
  for (uint32_t id = 2; id < 6; ++id) giver_.Fetch(id);
  const auto damaged = taker_.Settle();
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].page.page, PageId(1));
  EXPECT_EQ(damaged[0].from, PageCache::From::kWorker);
  EXPECT_TRUE(damaged[0].replaced);
  EXPECT_EQ(taker_.cache().page_count(), 0u);
  EXPECT_EQ(taker_.Apply(1, false), PageCache::Outcome::kReceived);
  EXPECT_TRUE(taker_.Settle().empty());
}

TEST_F(PageSharingTest, ADamagedFrameIsFoundOutByItsChecksum) {
  giver_.Fetch(1);
  EXPECT_EQ(taker_.Listed(), Pages{1});
  const auto memory = giver_.sharing().offer().memory;
  const std::span<std::byte> frames = taker_.device().Open(memory).value();
  const PageView view = giver_.cache().view().pages[giver_.cache().selected()[0].value];
  const_cast<std::byte*>(view.v)[5] ^= std::byte{1};
  taker_.device().Close(frames.data());
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(1, true), PageCache::Outcome::kTaken);
  const auto damaged = taker_.Settle();
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].from, PageCache::From::kWorker);
  EXPECT_FALSE(damaged[0].replaced);
}

TEST_F(PageSharingTest, AWorkerThatIsNoLongerNamedIsLetGo) {
  giver_.Fetch(1);
  EXPECT_EQ(taker_.Listed(), Pages{1});
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(1, true), PageCache::Outcome::kTaken);
  taker_.sharing().SetOthers({});
  EXPECT_EQ(taker_.sharing().other_count(), 0u);
  const auto damaged = taker_.Settle();  // nobody can say whether it was replaced
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_TRUE(damaged[0].replaced);
  EXPECT_EQ(taker_.Listed(), Pages{});
  // Between the list and the answer.
  taker_.sharing().SetOthers({giver_.named(2)});
  EXPECT_EQ(taker_.Listed(), Pages{1});
  taker_.sharing().SetOthers({});
  taker_.cache().BeginStep();
  EXPECT_EQ(taker_.Apply(1, true), PageCache::Outcome::kMissed);
}

TEST_F(PageSharingTest, ACacheThatEndsLeavesNothingToBeFound) {
  {
    Worker other(3);
    taker_.sharing().SetOthers({other.named(1)});
    other.Fetch(1);
    EXPECT_EQ(taker_.Listed(), Pages{1});
  }
  EXPECT_EQ(taker_.Listed(), Pages{});
}

TEST_F(PageSharingTest, NamesThatAreNoneOpenNothing) {
  wire::SharedFrames forged = giver_.named(1);
  forged.directory[8] ^= std::byte{1};
  wire::SharedFrames cut = giver_.named(2);
  cut.directory.pop_back();
  wire::SharedFrames memory = giver_.named(3);
  memory.memory[100] ^= std::byte{1};
  taker_.sharing().SetOthers({forged, cut, memory});
  EXPECT_EQ(taker_.sharing().other_count(), 0u);
  EXPECT_EQ(taker_.Listed(), Pages{});
}

TEST_F(PageSharingTest, ADirectoryOfMoreFramesThanThereAreIsRefused) {
  const PageDirectory large = PageDirectory::Make(kShape, 100000).value();
  wire::SharedFrames named = giver_.named(1);
  std::memcpy(named.directory.data(), &large.name(), sizeof(large.name()));
  taker_.sharing().SetOthers({named});
  EXPECT_EQ(taker_.sharing().other_count(), 0u);
}

// Many pages come and go at the giver while the taker takes what it finds: never a wrong one.
TEST_F(PageSharingTest, RandomPagesOfTwoWorkersAreAlwaysRight) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  uint32_t taken = 0;
  for (int step = 0; step < 60; ++step) {
    if (random() % 2 == 0) giver_.Fetch(static_cast<uint32_t>(random() % 6));
    const Pages listed = taker_.Listed();
    const auto id = static_cast<uint32_t>(random() % 6);
    const bool held = std::find(listed.begin(), listed.end(), id) != listed.end();
    if (random() % 4 == 0) giver_.Fetch(static_cast<uint32_t>(random() % 6));
    taker_.cache().BeginStep();
    const PageCache::Outcome outcome = taker_.Apply(id, held);
    if (random() % 4 == 0) giver_.Fetch(static_cast<uint32_t>(random() % 6));
    taken += outcome == PageCache::Outcome::kTaken ? 1 : 0;
    (void)taker_.Settle();
  }
  EXPECT_GT(taken, 0u);
}

}  // namespace
}  // namespace icecache
