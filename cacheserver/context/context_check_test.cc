// The check of a selection: what it says must be what attention over all rows says.
#include <gtest/gtest.h>

#include "cacheserver/context/test_context.h"

namespace icecache {
namespace {

class SelectionCheckTest : public OneSliceTest {
 protected:
  SelectionCheck Check(const Context& context, const wire::HeadSelection& selection) {
    const auto check = context.CheckSelection(kLayer, kHead, queries_.data(), selection);
    EXPECT_TRUE(check.ok()) << check.status().ToString();
    EXPECT_TRUE(check.ok() && check->has_value());
    return **check;
  }
};

TEST_F(SelectionCheckTest, AnExactAnswerHasNoError) {
  const auto context = Built(PolicyKind::kExact);
  const SelectionCheck few = Check(*context, Ask(*context, 2, true));
  EXPECT_LT(few.output_error, 1e-5) << "pages and an exact residual are everything";
  EXPECT_GT(few.mass, 0);
  EXPECT_LT(few.mass, 0.9);
  const SelectionCheck all = Check(*context, Ask(*context, 100, false));
  EXPECT_NEAR(all.mass, 1, 1e-5);
  EXPECT_LT(all.output_error, 1e-5);
}

TEST_F(SelectionCheckTest, WhatIsLeftOutShows) {
  const auto context = Built(PolicyKind::kSequential);
  const SelectionCheck two = Check(*context, Ask(*context, 2, false));
  const SelectionCheck ten = Check(*context, Ask(*context, 10, false));
  EXPECT_GT(two.output_error, 0.02);
  EXPECT_LT(ten.output_error, two.output_error);
  EXPECT_GT(ten.mass, two.mass);
}

TEST_F(SelectionCheckTest, PendingRowsAndForksCount) {
  auto parent = Built(PolicyKind::kExact);
  ASSERT_TRUE(parent->Seal().ok());
  ContextSpec spec = parent->spec();
  spec.id = ContextId(2);
  spec.segment = SegmentId(2);
  auto fork = Context::Fork(*parent, spec).value();
  const uint32_t first = *fork->NextPosition(kLayer, kHead);
  ASSERT_TRUE(fork->Append(kLayer, kHead, first, 3, rows_.K(first, 3), rows_.V(first, 3)).ok());
  EXPECT_LT(Check(*fork, Ask(*fork, 4, true)).output_error, 1e-5) << "three pending";
  ASSERT_TRUE(fork->IndexPending(kLayer, kHead, 3).ok());
  EXPECT_LT(Check(*fork, Ask(*fork, 4, true)).output_error, 1e-5) << "three indexed";
  EXPECT_LT(Check(*fork, Ask(*fork, 100, false)).output_error, 1e-5);
}

TEST_F(SelectionCheckTest, NothingIndexedIsNotChecked) {
  auto context = Make(7, PolicyKind::kExact);
  queries_ = rows_.Queries(3, kGroup, 1);
  const auto check = context->CheckSelection(kLayer, kHead, queries_.data(), {});
  ASSERT_TRUE(check.ok());
  EXPECT_FALSE(check->has_value());
  EXPECT_FALSE(context->CheckSelection(LayerId(9), kHead, queries_.data(), {}).ok());
}

}  // namespace
}  // namespace icecache
