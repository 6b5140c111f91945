#include "worker/page_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "kernels/int8_rows.h"
#include "worker/test_rows.h"

namespace icecache {
namespace {

using Outcome = PageCache::Outcome;

// The server's pages: what a payload is made from.
struct ServerPage {
  uint32_t version = 1;
  std::vector<std::vector<std::byte>> k, v;
  std::vector<uint32_t> positions;
};

class Server {
 public:
  explicit Server(uint64_t seed) : rng_(seed) {}

  void Grow(uint32_t page) {
    ServerPage& p = pages_[page];
    if (p.positions.size() == limits::kPageTokens) return;
    p.k.push_back(Row());
    p.v.push_back(Row());
    p.positions.push_back(static_cast<uint32_t>(16 + rng_() % 1000));
  }
  // Rows move: another version with other rows.
  void Move(uint32_t page) {
    const size_t rows = pages_[page].positions.size();
    const uint32_t version = pages_[page].version + 1;
    pages_[page] = {};
    pages_[page].version = version;
    for (size_t i = 0; i < std::max<size_t>(1, rows / 2); ++i) Grow(page);
  }
  const ServerPage& page(uint32_t page) { return pages_[page]; }

  // The payload of rows [from, fill). Bytes live until the next call.
  wire::PagePayload Payload(uint32_t page, uint8_t from) {
    const ServerPage& p = pages_[page];
    const auto join = [](const auto& rows, size_t begin) {
      std::vector<std::byte> all;
      for (size_t i = begin; i < rows.size(); ++i) {
        all.insert(all.end(), rows[i].begin(), rows[i].end());
      }
      return all;
    };
    const auto* positions = reinterpret_cast<const std::byte*>(p.positions.data());
    const size_t fill = p.positions.size();
    wire::PagePayload payload{SegmentId(3), PageId(page), p.version, static_cast<uint8_t>(fill),
                              from};
    payload.checksum = PageChecksum({3, page, p.version}, join(p.k, 0), join(p.v, 0),
                                    {positions, fill * sizeof(uint32_t)});
    k_ = join(p.k, from);
    v_ = join(p.v, from);
    positions_.assign(positions + from * sizeof(uint32_t), positions + fill * sizeof(uint32_t));
    payload.k_rows = k_;
    payload.v_rows = v_;
    payload.positions = positions_;
    return payload;
  }
  std::vector<std::byte>& v_bytes() { return v_; }

 private:
  std::vector<std::byte> Row() {
    std::vector<std::byte> row(test::SmallShape().row_bytes());
    for (std::byte& b : row) b = static_cast<std::byte>(rng_());
    return row;
  }
  std::mt19937_64 rng_;
  std::map<uint32_t, ServerPage> pages_;
  std::vector<std::byte> k_, v_, positions_;
};

constexpr TokenPos kBegin(16), kEnd(100000);

// As a server does: only what the request does not name as held.
uint8_t HeldRows(PageCache& cache, const ServerPage& page, uint32_t id) {
  std::vector<wire::ResidentPage> resident;
  cache.ListResident(&resident);
  for (const wire::ResidentPage& r : resident) {
    if (r.page.value == id && r.version == page.version) return r.fill;
  }
  return 0;
}

void ExpectContent(const PageCache& cache, const ServerPage& page) {
  const PageView view = cache.view().pages[cache.selected().back().value];
  ASSERT_EQ(view.fill, page.positions.size());
  for (uint32_t i = 0; i < view.fill; ++i) {
    ASSERT_EQ(std::memcmp(view.k + i * page.k[i].size(), page.k[i].data(), page.k[i].size()), 0);
    ASSERT_EQ(std::memcmp(view.v + i * page.v[i].size(), page.v[i].data(), page.v[i].size()), 0);
  }
}

TEST(PageCache, RandomOperationsAgreeWithTheServersPages) {
  const uint64_t seed = 20260;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 rng(seed);
  const ModelShape shape = test::SmallShape();
  PageArena arena(shape.page_bytes());
  PageCache cache(shape, 12, arena);
  Server server(seed);
  for (uint32_t p = 0; p < 40; ++p) server.Grow(p);
  for (int step = 0; step < 3000; ++step) {
    for (int i = 0; i < 3; ++i) server.Grow(static_cast<uint32_t>(rng() % 40));
    if (rng() % 8 == 0) server.Move(static_cast<uint32_t>(rng() % 40));
    cache.BeginStep();
    std::set<uint32_t> asked;
    const size_t count = 1 + rng() % 8;
    while (asked.size() < count) asked.insert(static_cast<uint32_t>(rng() % 40));
    size_t used = 0;
    for (const uint32_t id : asked) {
      const uint8_t from = HeldRows(cache, server.page(id), id);
      wire::PagePayload payload = server.Payload(id, from);
      const bool damage = from < payload.fill && rng() % 10 == 0;
      if (damage) server.v_bytes()[rng() % server.v_bytes().size()] ^= std::byte{4};
      const Outcome outcome = cache.Apply(payload, kBegin, kEnd);
      ASSERT_EQ(outcome, damage                 ? Outcome::kBad
                         : from == payload.fill ? Outcome::kHit
                                                : Outcome::kReceived);
      if (damage) continue;
      ++used;
      ExpectContent(cache, server.page(id));
    }
    ASSERT_EQ(cache.selected().size(), used);
    const Status valid = cache.Validate();
    ASSERT_TRUE(valid.ok()) << valid.ToString();
    ASSERT_LE(cache.page_count(), 12u);
  }
  EXPECT_LE(arena.bytes(), 32 * shape.page_bytes());  // one chunk: frames are reused
}

class PageCacheOnePage : public ::testing::Test {
 protected:
  PageCacheOnePage() {
    for (int i = 0; i < 5; ++i) server_.Grow(1);
  }
  const ModelShape shape_ = test::SmallShape();
  PageArena arena_{shape_.page_bytes()};
  PageCache cache_{shape_, 4, arena_};
  Server server_{77};
};

TEST_F(PageCacheOnePage, ADamagedPageIsNeverSelected) {
  const wire::PagePayload payload = server_.Payload(1, 0);
  server_.v_bytes()[3] ^= std::byte{1};
  EXPECT_EQ(cache_.Apply(payload, kBegin, kEnd), Outcome::kBad);
  EXPECT_TRUE(cache_.selected().empty());
  EXPECT_EQ(cache_.page_count(), 0u);
}

TEST_F(PageCacheOnePage, DamagedNewRowsTakeTheWholePageDown) {
  ASSERT_EQ(cache_.Apply(server_.Payload(1, 0), kBegin, kEnd), Outcome::kReceived);
  cache_.BeginStep();
  server_.Grow(1);
  const wire::PagePayload payload = server_.Payload(1, 5);
  server_.v_bytes()[0] ^= std::byte{1};
  EXPECT_EQ(cache_.Apply(payload, kBegin, kEnd), Outcome::kBad);
  EXPECT_EQ(cache_.page_count(), 0u);
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 0), kBegin, kEnd), Outcome::kReceived);
}

TEST_F(PageCacheOnePage, ARightPageUnderAnotherNameIsRefused) {
  wire::PagePayload payload = server_.Payload(1, 0);
  payload.page = PageId(2);
  EXPECT_EQ(cache_.Apply(payload, kBegin, kEnd), Outcome::kBad);
}

TEST_F(PageCacheOnePage, PositionsOutsideTheIndexAreRefused) {
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 0), TokenPos(2000), kEnd), Outcome::kBad);
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 0), TokenPos(0), TokenPos(16)), Outcome::kBad);
}

TEST_F(PageCacheOnePage, APageNamedTwiceCountsOnce) {
  ASSERT_EQ(cache_.Apply(server_.Payload(1, 0), kBegin, kEnd), Outcome::kReceived);
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 5), kBegin, kEnd), Outcome::kRepeated);
  EXPECT_EQ(cache_.selected_tokens(), 5u);
}

TEST_F(PageCacheOnePage, ANewPageDoesNotEvictOneThatTheSameReplyCountsOn) {
  for (const uint32_t p : {20u, 21u, 22u, 23u}) server_.Grow(p);
  for (const uint32_t p : {1u, 20u, 21u, 22u}) {  // full: 4 pages
    cache_.BeginStep();
    ASSERT_EQ(cache_.Apply(server_.Payload(p, 0), kBegin, kEnd), Outcome::kReceived);
  }
  cache_.BeginStep();
  std::vector<wire::PagePayload> reply = {server_.Payload(23, 0)};  // best first; its bytes live on
  for (const uint32_t p : {1u, 20u, 21u}) {
    wire::PagePayload held = reply[0];
    held.page = PageId(p);
    held.fill = held.from = static_cast<uint8_t>(server_.page(p).positions.size());
    Server other = server_;
    held.checksum = other.Payload(p, 0).checksum;
    held.k_rows = held.v_rows = held.positions = {};
    reply.push_back(held);
  }
  int hits = 0, received = 0;
  cache_.ApplyAll(reply, kBegin, kEnd, [&](const wire::PagePayload&, Outcome outcome) {
    hits += outcome == Outcome::kHit ? 1 : 0;
    received += outcome == Outcome::kReceived ? 1 : 0;
  });
  EXPECT_EQ(hits, 3);
  EXPECT_EQ(received, 1);
  EXPECT_EQ(cache_.selected().size(), 4u);
}

TEST_F(PageCacheOnePage, AReferenceToWhatIsNotHereIsBad) {
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 5), kBegin, kEnd), Outcome::kBad);
  EXPECT_EQ(cache_.Apply(server_.Payload(1, 2), kBegin, kEnd), Outcome::kBad);
}

TEST_F(PageCacheOnePage, AStepMayUseOnlyTheFirstRows) {
  ASSERT_EQ(cache_.Apply(server_.Payload(1, 0), kBegin, kEnd, 3), Outcome::kReceived);
  EXPECT_EQ(cache_.selected_tokens(), 3u);
  cache_.BeginStep();
  ASSERT_EQ(cache_.Apply(server_.Payload(1, 5), kBegin, kEnd), Outcome::kHit);
  EXPECT_EQ(cache_.selected_tokens(), 5u);
}

TEST_F(PageCacheOnePage, PagesOfOtherSegmentsGoWithTheirContext) {
  ASSERT_EQ(cache_.Apply(server_.Payload(1, 0), kBegin, kEnd), Outcome::kReceived);
  const SegmentId kept[] = {SegmentId(3)};
  cache_.RetainSegments(kept);
  EXPECT_EQ(cache_.page_count(), 1u);
  EXPECT_TRUE(cache_.selected().empty());
  cache_.RetainSegments({});
  EXPECT_EQ(cache_.page_count(), 0u);
  EXPECT_TRUE(cache_.Validate().ok());
}

TEST_F(PageCacheOnePage, RecentlyUsedPagesOutliveOthers) {
  for (uint32_t p = 10; p < 20; ++p) server_.Grow(p);
  (void)cache_.Apply(server_.Payload(1, 0), kBegin, kEnd);
  for (uint32_t p = 10; p < 20; ++p) {  // page 1 is asked for in every second step
    cache_.BeginStep();
    if (p % 2 == 0) {
      const uint8_t held = HeldRows(cache_, server_.page(1), 1);
      EXPECT_EQ(held, 5) << "step " << p;
      (void)cache_.Apply(server_.Payload(1, held), kBegin, kEnd);
    }
    EXPECT_EQ(cache_.Apply(server_.Payload(p, 0), kBegin, kEnd), Outcome::kReceived);
  }
}

// Content of which the int8 code makes sense: the server's rows are any bits.
wire::PagePayload Coded(std::mt19937_64& rng, const ModelShape& shape, uint8_t fill,
                        std::vector<std::byte>* bytes) {
  const std::vector<float> k = test::RandomFloats(rng, size_t{fill} * shape.head_dim);
  std::vector<std::byte> rows(k.size() * DTypeBytes(shape.dtype));
  FromF32(k.data(), k.size(), shape.dtype, rows.data());
  const size_t room = Int8RowsBytesMax(shape.dtype, fill, shape.head_dim);
  bytes->resize(room + fill * sizeof(uint32_t));
  const size_t coded =
      EncodeInt8Rows({shape.dtype, shape.head_dim, fill, rows.data(), rows.data()}, bytes->data());
  for (uint32_t i = 0; i < fill; ++i) {
    const uint32_t position = 20 + i;
    std::memcpy(bytes->data() + room + i * sizeof(position), &position, sizeof(position));
  }
  wire::PagePayload page{SegmentId(3), PageId(1), 1, fill};
  page.checksum = 4711;  // of rows that are not here
  page.coded = std::span(*bytes).first(coded);
  page.coded_bytes = static_cast<uint32_t>(coded);
  page.positions = std::span(*bytes).subspan(room);
  page.coded_checksum = PageChecksum({3, 1, 1}, page.coded, {}, page.positions);
  return page;
}

TEST(PageCache, CodedPagesAreVerifiedAsTheyTravelledAndCannotGrow) {
  std::mt19937_64 rng(4);
  const ModelShape shape = test::SmallShape(1, 1, 1, 32);
  PageArena arena(shape.page_bytes());
  PageCache cache(shape, 4, arena);
  std::vector<std::byte> bytes;
  wire::PagePayload page = Coded(rng, shape, 12, &bytes);
  EXPECT_EQ(cache.Apply(page, kBegin, kEnd), Outcome::kReceived);
  EXPECT_EQ(cache.selected_tokens(), 12u);
  std::vector<uint32_t> positions;
  cache.ListSelectedPositions(&positions);
  EXPECT_EQ(positions.size(), 12u);
  EXPECT_EQ(positions.back(), 31u);
  ASSERT_TRUE(cache.Validate().ok());

  cache.BeginStep();
  wire::PagePayload again = page;
  again.from = again.fill;
  again.coded_bytes = 0;
  EXPECT_EQ(cache.Apply(again, kBegin, kEnd), Outcome::kHit);
  cache.BeginStep();
  again.fill = 13;  // a row more, on top of rows that are only nearly those of the server
  EXPECT_EQ(cache.Apply(again, kBegin, kEnd), Outcome::kBad);
  EXPECT_EQ(cache.page_count(), 0u);

  cache.BeginStep();
  bytes[40] ^= std::byte{1};
  EXPECT_EQ(cache.Apply(page, kBegin, kEnd), Outcome::kBad);
  page.coded_checksum = PageChecksum({3, 1, 1}, page.coded, {}, page.positions);
  EXPECT_EQ(cache.Apply(page, kBegin, TokenPos(31)), Outcome::kBad);  // a position too far
  EXPECT_TRUE(cache.selected().empty());
}

}  // namespace
}  // namespace icecache
