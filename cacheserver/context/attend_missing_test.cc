// Selections in which the server attends to the pages that the worker lacks (reply mode "attend").
#include <gtest/gtest.h>

#include "cacheserver/context/test_context.h"

namespace icecache {
namespace {

class AttendMissing : public OneSliceTest {
 protected:
  wire::HeadSelection Select(std::span<const wire::ResidentPage> resident, bool attend,
                             bool residual = true) {
    return Ask(*context_, 8, residual, resident, {.attend_missing = attend, .whole_pages = whole_});
  }
  // Sinks, window, `attended` pages and the residual.
  std::vector<float> Attend(wire::HeadSelection selection,
                            const std::vector<wire::PagePayload>& attended) {
    AttentionStates states(kGroup, kDim);
    attention_->AttendRows(queries_.data(), rows_.Rows(0, kSinks), states.ref());
    attention_->AttendRows(queries_.data(), rows_.Rows(kTokens - kWindow, kWindow), states.ref());
    for (const wire::PagePayload& page : attended) {
      attention_->AttendRows(queries_.data(),
                             {DType::kF16, kDim, page.fill, page.k_rows.data(), page.v_rows.data()},
                             states.ref());
    }
    float* flat = selection.residual.data();
    MergeStates({kGroup, kDim, flat, flat + kGroup, flat + 2 * size_t{kGroup}}, states.ref());
    std::vector<float> out(queries_.size());
    FinishStates(states.ref(), out.data());
    return out;
  }
  void ExpectFull(const std::vector<float>& out) {
    const std::vector<float> truth = rows_.FullAttention(queries_, kGroup, kTokens);
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], truth[i], 2e-4) << i;
  }

  std::unique_ptr<Context> context_ = Built(PolicyKind::kExact);
  bool whole_ = false;
};

TEST_F(AttendMissing, NothingTravelsAndTheSumIsFullAttention) {
  const wire::HeadSelection selection = Select({}, true);
  ASSERT_EQ(selection.pages.size(), 8u);
  for (const wire::PagePayload& page : selection.pages) {
    EXPECT_EQ(page.place, wire::PagePlace::kAttended);
    EXPECT_EQ(page.from, page.fill);
    EXPECT_TRUE(page.k_rows.empty() && page.v_rows.empty() && page.positions.empty());
  }
  ExpectFull(Attend(selection, {}));
}

TEST_F(AttendMissing, PagesThatTheWorkerHoldsAreLeftToIt) {
  const wire::HeadSelection whole = Select({}, false);
  ExpectFull(Attend(whole, whole.pages));
  std::vector<wire::ResidentPage> resident;
  std::vector<wire::PagePayload> held(whole.pages.begin(), whole.pages.begin() + 3);
  for (const wire::PagePayload& page : held) {
    resident.push_back({page.segment, page.page, page.version, page.fill});
  }
  // Held in part only: attended to as a whole by the server, so that no token counts twice.
  const wire::PagePayload& part = whole.pages[3];
  ASSERT_GT(part.fill, 1);
  resident.push_back({part.segment, part.page, part.version, static_cast<uint8_t>(part.fill - 1)});
  const wire::HeadSelection selection = Select(resident, true);
  int attended = 0;
  for (const wire::PagePayload& page : selection.pages) {
    attended += page.place == wire::PagePlace::kAttended ? 1 : 0;
  }
  EXPECT_EQ(attended, 5);
  ExpectFull(Attend(selection, held));
}

// Asked for by workers whose copies are lossy.
TEST_F(AttendMissing, APageThatHasGrownComesWholeWhereAskedFor) {
  const wire::PagePayload page = Select({}, false).pages[0];
  ASSERT_GT(page.fill, 1);
  std::vector<wire::ResidentPage> held = {
      {page.segment, page.page, page.version, static_cast<uint8_t>(page.fill - 1)}};
  EXPECT_EQ(Select(held, false).pages[0].from, page.fill - 1);
  whole_ = true;
  EXPECT_EQ(Select(held, false).pages[0].from, 0);
  held[0].fill = page.fill;
  EXPECT_EQ(Select(held, false).pages[0].from, page.fill);
}

TEST_F(AttendMissing, WithoutResidualOnlyTheChosenPagesAreInTheState) {
  const wire::HeadSelection whole = Select({}, false, false);
  EXPECT_TRUE(whole.residual.empty());
  const wire::HeadSelection selection = Select({}, true, false);
  AttentionStates truth(kGroup, kDim);
  for (const wire::PagePayload& page : whole.pages) {
    attention_->AttendRows(queries_.data(),
                           {DType::kF16, kDim, page.fill, page.k_rows.data(), page.v_rows.data()},
                           truth.ref());
  }
  const std::span<const float> flat = truth.flat();
  ASSERT_EQ(selection.residual.size(), flat.size());
  for (size_t i = 0; i < flat.size(); ++i) EXPECT_NEAR(selection.residual[i], flat[i], 1e-3) << i;
}

TEST_F(AttendMissing, PagesAreNamedByExtentAndOffsetOfTheirFrames) {
  for (const wire::PagePayload& page : Select({}, false).pages) {
    bool found = false;
    for (const PagePool::ExtentInfo& extent : pool_.ExtentsOf(TenantId(1))) {
      found = found || extent.serial == page.extent;
    }
    EXPECT_TRUE(found);
    EXPECT_EQ(page.offset % 64, 0u);
  }
}

}  // namespace
}  // namespace icecache
