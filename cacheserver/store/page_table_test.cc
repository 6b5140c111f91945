#include "cacheserver/store/page_table.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "common/checksum.h"
#include "common/model_shape.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 64;
const SegmentId kSegment(77);

struct TestRow {
  std::array<std::byte, kDim * 2> k, v;
  explicit TestRow(uint32_t position) {
    std::mt19937 rng(position);
    for (auto& b : k) b = static_cast<std::byte>(rng());
    for (auto& b : v) b = static_cast<std::byte>(rng());
  }
};

class PageTableTest : public testing::Test {
 protected:
  PagePool pool_{4 * limits::kExtentBytes};
  PageTable::Options options_{TenantId(1), kSegment, DType::kF16, kDim};

  static void Append(PageTable& table, PageId page, uint32_t position) {
    const TestRow row(position);
    table.AppendRow(page, row.k.data(), row.v.data(), position);
  }
  static void ExpectRows(const PageTable& table, PageId page,
                         const std::vector<uint32_t>& positions) {
    const PageContent content = table.content(page);
    ASSERT_EQ(content.fill, positions.size());
    for (size_t i = 0; i < positions.size(); ++i) {
      const TestRow row(positions[i]);
      EXPECT_EQ(std::memcmp(content.k_rows.data() + i * kDim * 2, row.k.data(), kDim * 2), 0);
      EXPECT_EQ(std::memcmp(content.v_rows.data() + i * kDim * 2, row.v.data(), kDim * 2), 0);
      EXPECT_EQ(table.positions(page)[i], positions[i]);
    }
    EXPECT_EQ(content.checksum, PageChecksum({kSegment.value, page.value, content.version},
                                             content.k_rows, content.v_rows, content.positions));
    const PageView& view = table.view().pages[page.value];
    EXPECT_EQ(view.k, content.k_rows.data());
    EXPECT_EQ(view.fill, content.fill);
  }
};

TEST_F(PageTableTest, AFrameIsWhatTheShapeSaysAPageIs) {
  PageTable table(pool_, options_);
  ASSERT_TRUE(table.ReserveFrames(1).ok());
  ModelShape shape;
  shape.head_dim = kDim;
  EXPECT_EQ(table.frame_bytes_held(), shape.page_bytes());
}

TEST_F(PageTableTest, GrowthKeepsRowsInPlaceAndTheVersion) {
  PageTable table(pool_, options_);
  ASSERT_TRUE(table.ReserveFrames(1).ok());
  const PageId page = table.AddPage(5);
  Append(table, page, 10);
  table.Commit(page);
  const PageContent before = table.content(page);
  Append(table, page, 11);
  table.Commit(page);
  ExpectRows(table, page, {10, 11});
  EXPECT_EQ(table.content(page).version, 5u);
  EXPECT_EQ(table.content(page).k_rows.data(), before.k_rows.data());
  EXPECT_NE(table.content(page).checksum, before.checksum);
}

TEST_F(PageTableTest, RowsMoveToTheEndOfAPageAndTheOldFrameStaysWithItsReaders) {
  PageTable table(pool_, options_);
  ASSERT_TRUE(table.ReserveFrames(3).ok());
  const PageId page = table.AddPage(1);
  for (uint32_t p = 0; p < 16; ++p) Append(table, page, p);
  table.Commit(page);
  const PageContent old = table.content(page);
  const auto pin = pool_.Pin();
  const std::vector<std::byte> copy(old.k_rows.begin(), old.k_rows.end());

  const PageId other = table.AddPage(9);
  Append(table, other, 40);
  table.MoveRows(page, 0b1010'0000'0000'0010, other, 8);
  ExpectRows(table, page, {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14});
  ExpectRows(table, other, {40, 1, 13, 15});
  EXPECT_EQ(table.content(page).version, 8u);
  EXPECT_EQ(table.content(other).version, 9u);
  EXPECT_EQ(table.FindPosition(13), other);
  EXPECT_EQ(table.token_count(), 17u);
  EXPECT_EQ(pool_.usage().waiting_frames, 1u);
  ASSERT_TRUE(table.ReserveFrames(100).ok());
  EXPECT_EQ(std::memcmp(old.k_rows.data(), copy.data(), copy.size()), 0);
  EXPECT_TRUE(table.Validate().ok());
}

TEST_F(PageTableTest, ValidateFindsAByteThatChanged) {
  PageTable table(pool_, options_);
  ASSERT_TRUE(table.ReserveFrames(1).ok());
  const PageId page = table.AddPage(1);
  Append(table, page, 3);
  table.Commit(page);
  ASSERT_TRUE(table.Validate().ok());
  table.frame(page).data[7] ^= std::byte{1};
  EXPECT_EQ(table.Validate().code(), StatusCode::kDataLoss);
}

TEST_F(PageTableTest, FramesGoBackWithTheTable) {
  {
    PageTable table(pool_, options_);
    ASSERT_TRUE(table.ReserveFrames(50).ok());
    for (uint32_t p = 0; p < 20; ++p) {
      const PageId page = table.AddPage(p + 1);
      Append(table, page, p);
      table.Commit(page);
    }
    EXPECT_EQ(table.spare_frames(), 30u);
    table.ReleaseSpares();
    EXPECT_EQ(pool_.usage().frames, 20u);
  }
  EXPECT_EQ(pool_.usage().held_bytes(), 0u);
}

}  // namespace
}  // namespace icecache
