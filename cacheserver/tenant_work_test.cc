#include "cacheserver/tenant_work.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/limits.h"

namespace icecache {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using ::testing::HasSubstr;

constexpr TenantId kHeavy{0}, kLight{1};

class TenantWorkTest : public ::testing::Test {
 protected:
  // What it does is to take time.
  Status Submit(TenantId tenant, Duration takes, TimePoint deadline = TimePoint::max()) {
    return work_.Submit(
        tenant,
        {.bytes = 10, .deadline = deadline, .run = [this, tenant, takes](const Status& status) {
           order_.push_back(tenant);
           results_.push_back(status);
           if (status.ok()) clock_.Advance(takes);
         }});
  }
  const TenantLoad& load(TenantId tenant) { return work_.loads().at(tenant); }

  ManualClock clock_;
  Reactor reactor_{clock_, Duration(0)};
  TenantWork work_{reactor_};
  std::vector<TenantId> order_;
  std::vector<Status> results_;
};

TEST_F(TenantWorkTest, ALongRequestIsFollowedByATurnOfTheLoop) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Submit(kHeavy, milliseconds(1)).ok());
  EXPECT_TRUE(order_.empty());  // not from inside Submit
  for (size_t turn = 1; turn <= 3; ++turn) {
    reactor_.Poll();
    EXPECT_EQ(order_.size(), turn);
  }
  EXPECT_FALSE(reactor_.Poll());
}

TEST_F(TenantWorkTest, ShortRequestsShareATurn) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Submit(kHeavy, microseconds(5)).ok());
  reactor_.Poll();
  EXPECT_EQ(order_.size(), 3u);
}

TEST_F(TenantWorkTest, WhatArrivesBehindAFloodIsNext) {
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(Submit(kHeavy, milliseconds(1)).ok());
  for (int i = 0; i < 5; ++i) reactor_.Poll();
  ASSERT_TRUE(Submit(kLight, microseconds(1)).ok());
  reactor_.Poll();
  reactor_.Poll();
  EXPECT_THAT(order_, ::testing::Contains(kLight));
  EXPECT_EQ(load(kHeavy).queued + order_.size(), 51u);
  EXPECT_EQ(load(kHeavy).queued_bytes, 10 * load(kHeavy).queued);
  EXPECT_EQ(load(kLight).service, microseconds(1));
}

TEST_F(TenantWorkTest, ARequestWhoseDeadlinePassedIsToldSoAndNotServed) {
  ASSERT_TRUE(Submit(kHeavy, milliseconds(10)).ok());
  ASSERT_TRUE(Submit(kHeavy, milliseconds(10), clock_.Now() + milliseconds(5)).ok());
  ASSERT_TRUE(Submit(kHeavy, milliseconds(10), clock_.Now() + milliseconds(50)).ok());
  while (reactor_.Poll()) {
  }
  ASSERT_EQ(results_.size(), 3u);
  EXPECT_TRUE(results_[0].ok());
  EXPECT_EQ(results_[1].code(), StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(results_[2].ok());
  EXPECT_EQ(load(kHeavy).expired, 1u);
  EXPECT_EQ(load(kHeavy).service, milliseconds(20));
}

TEST_F(TenantWorkTest, TooManyRequestsOfOneTenantAreRefusedAndOthersAreNot) {
  for (uint32_t i = 0; i < limits::kTenantRequestsQueuedMax; ++i)
    ASSERT_TRUE(Submit(kHeavy, Duration(0)).ok());
  const Status refused = Submit(kHeavy, Duration(0));
  EXPECT_EQ(refused.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(refused.message(), HasSubstr("4096 requests (40960 bytes) of this tenant"));
  EXPECT_EQ(load(kHeavy).refused, 1u);
  EXPECT_TRUE(Submit(kLight, Duration(0)).ok());
  while (reactor_.Poll()) {
  }
  EXPECT_EQ(order_.size(), limits::kTenantRequestsQueuedMax + 1);
  EXPECT_TRUE(Submit(kHeavy, Duration(0)).ok());
}

TEST_F(TenantWorkTest, SoAreTooManyBytes) {
  const auto submit = [&](uint64_t bytes) {
    return work_.Submit(kHeavy, {.bytes = bytes, .run = [](const Status&) {}}).code();
  };
  EXPECT_EQ(submit(limits::kTenantBytesQueuedMax - 5), StatusCode::kOk);
  EXPECT_EQ(submit(6), StatusCode::kResourceExhausted);
  EXPECT_EQ(submit(~uint64_t{0}), StatusCode::kResourceExhausted);
  EXPECT_EQ(submit(5), StatusCode::kOk);
}

TEST_F(TenantWorkTest, WorkOutsideOfRequestsIsChargedOnce) {
  {
    const TenantWork::Meter outer(work_, kHeavy);
    clock_.Advance(milliseconds(3));
    const TenantWork::Meter inner(work_, kHeavy);
    clock_.Advance(milliseconds(4));
  }
  EXPECT_EQ(load(kHeavy).service, milliseconds(7));
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(Submit(kHeavy, milliseconds(1)).ok());
    ASSERT_TRUE(Submit(kLight, milliseconds(1)).ok());
  }
  for (int i = 0; i < 6; ++i) reactor_.Poll();
  EXPECT_EQ(std::count(order_.begin(), order_.end(), kLight), 6);
}

TEST_F(TenantWorkTest, WhatWaitsWhenItEndsIsDropped) {
  auto work = std::make_unique<TenantWork>(reactor_);
  bool ran = false;
  ASSERT_TRUE(work->Submit(kHeavy, {.run = [&](const Status&) { ran = true; }}).ok());
  work.reset();
  while (reactor_.Poll()) {
  }
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace icecache
