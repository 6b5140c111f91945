// The check of a selection: what it says must be what attention over all rows says.
#include <gtest/gtest.h>

#include <cmath>

#include "cacheserver/context/context.h"
#include "cacheserver/context/test_rows.h"

namespace icecache {
namespace {

constexpr uint32_t kSinks = 4, kWindow = 16, kTokens = 300, kGroup = 2, kDim = 32;
const LayerId kLayer(0);
const KvHeadId kHead(0);

class SelectionCheckTest : public testing::Test {
 protected:
  std::unique_ptr<Context> Make(uint64_t id, PolicyKind policy) {
    ContextSpec spec;
    spec.id = ContextId(id);
    spec.segment = SegmentId(id);
    spec.tenant = TenantId(1);
    spec.shape = {.layers = 1, .kv_heads = 1, .query_heads = kGroup, .head_dim = kDim};
    spec.sink_tokens = kSinks;
    spec.window_tokens = kWindow;
    spec.policy = policy;
    return Context::Create(spec, pool_, *attention_).value();
  }
  std::unique_ptr<Context> Built(PolicyKind policy) {
    auto context = Make(1, policy);
    KV_CHECK(context->PutRows(kLayer, kHead, 0, kTokens, rows_.K(0, kTokens), rows_.V(0, kTokens))
                 .ok());
    auto job = context->PrepareBuild(kLayer, kHead, kTokens, {}).value();
    job->Run();
    KV_CHECK(context->Install(kLayer, kHead, std::move(job)).ok());
    queries_ = rows_.Queries(3, kGroup, kTokens);
    return context;
  }
  wire::HeadSelection Select(const Context& context, uint32_t pages, bool residual) {
    SelectRequest request;
    request.queries = queries_.data();
    request.group = kGroup;
    request.max_pages = pages;
    request.read_cap = limits::kReadCapMax;
    request.residual = residual;
    wire::HeadSelection selection;
    Misses misses;
    EXPECT_TRUE(context.Select(kLayer, kHead, request, {}, &selection, &misses).ok());
    EXPECT_TRUE(misses.empty());
    return selection;
  }
  SelectionCheck Check(const Context& context, const wire::HeadSelection& selection) {
    const auto check = context.CheckSelection(kLayer, kHead, queries_.data(), selection);
    EXPECT_TRUE(check.ok()) << check.status().ToString();
    EXPECT_TRUE(check.ok() && check->has_value());
    return **check;
  }

  PagePool pool_{64 * limits::kExtentBytes};
  std::unique_ptr<AttentionBackend> attention_ = MakeReferenceAttention();
  TestRows rows_{77, DType::kF16, kDim};
  std::vector<float> queries_;
};

TEST_F(SelectionCheckTest, AnExactAnswerHasNoError) {
  const auto context = Built(PolicyKind::kExact);
  const SelectionCheck few = Check(*context, Select(*context, 2, true));
  EXPECT_LT(few.output_error, 1e-5) << "pages and an exact residual are everything";
  EXPECT_GT(few.mass, 0);
  EXPECT_LT(few.mass, 0.9);
  const SelectionCheck all = Check(*context, Select(*context, 100, false));
  EXPECT_NEAR(all.mass, 1, 1e-5);
  EXPECT_LT(all.output_error, 1e-5);
}

TEST_F(SelectionCheckTest, WhatIsLeftOutShows) {
  const auto context = Built(PolicyKind::kSequential);
  const SelectionCheck two = Check(*context, Select(*context, 2, false));
  const SelectionCheck ten = Check(*context, Select(*context, 10, false));
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
  EXPECT_LT(Check(*fork, Select(*fork, 4, true)).output_error, 1e-5) << "three pending";
  ASSERT_TRUE(fork->IndexPending(kLayer, kHead, 3).ok());
  EXPECT_LT(Check(*fork, Select(*fork, 4, true)).output_error, 1e-5) << "three indexed";
  EXPECT_LT(Check(*fork, Select(*fork, 100, false)).output_error, 1e-5);
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
