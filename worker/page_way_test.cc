#include "worker/page_way.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace icecache {
namespace {

using ::testing::HasSubstr;

constexpr PageWayFacts kAll{.landing = true, .mapped = true, .registers = true};

TEST(PageWay, NamesAreRead) {
  for (const PageWay way :
       {PageWay::kAuto, PageWay::kFrames, PageWay::kLanding, PageWay::kIpc, PageWay::kRegistered}) {
    EXPECT_EQ(ParsePageWay(PageWayName(way)).value(), way);
  }
  EXPECT_FALSE(ParsePageWay("teleport").ok());
}

TEST(PageWay, AutoTakesTheOneThatCopiesLeast) {
  const PageWayChoice all = ChoosePageWay(PageWay::kAuto, kAll);
  EXPECT_EQ(all.way, PageWay::kRegistered);
  EXPECT_THAT(all.reason, HasSubstr("this host"));

  PageWayFacts remote = kAll;
  remote.mapped = false;
  const PageWayChoice landing = ChoosePageWay(PageWay::kAuto, remote);
  EXPECT_EQ(landing.way, PageWay::kLanding);
  EXPECT_THAT(landing.reason, HasSubstr("not mapped"));

  remote.pushes = true;
  const PageWayChoice ipc = ChoosePageWay(PageWay::kAuto, remote);
  EXPECT_EQ(ipc.way, PageWay::kIpc);
  EXPECT_THAT(ipc.reason, HasSubstr("not mapped"));
  remote.pushes = false;
  remote.no_push = "it has other things to do";
  EXPECT_THAT(ChoosePageWay(PageWay::kAuto, remote).reason, HasSubstr("other things"));

  PageWayFacts old = kAll;
  old.registers = false;
  EXPECT_EQ(ChoosePageWay(PageWay::kAuto, old).way, PageWay::kLanding);
  EXPECT_THAT(ChoosePageWay(PageWay::kAuto, old).reason, HasSubstr("read-only"));

  const PageWayChoice frames = ChoosePageWay(PageWay::kAuto, {});
  EXPECT_EQ(frames.way, PageWay::kFrames);
  EXPECT_THAT(frames.reason, HasSubstr("landing buffer"));
}

// Whatever there is: the way that comes out is one that can be taken, and auto is never denied.
TEST(PageWay, WhatIsAskedForIsTakenOrDeniedWithTheReason) {
  for (int bits = 0; bits < 16; ++bits) {
    const PageWayFacts facts{.landing = (bits & 1) != 0,
                             .mapped = (bits & 2) != 0,
                             .registers = (bits & 4) != 0,
                             .pushes = (bits & 8) != 0};
    const auto possible = [&](PageWay way) {
      return way == PageWay::kFrames ||
             (facts.landing &&
              (way == PageWay::kLanding || (way == PageWay::kIpc && facts.pushes) ||
               (way == PageWay::kRegistered && facts.mapped && facts.registers)));
    };
    for (const PageWay asked :
         {PageWay::kFrames, PageWay::kLanding, PageWay::kIpc, PageWay::kRegistered}) {
      const PageWayChoice choice = ChoosePageWay(asked, facts);
      EXPECT_TRUE(possible(choice.way)) << bits;
      EXPECT_LE(choice.way, asked) << bits;  // nothing that was not asked for is tried first
      EXPECT_EQ(choice.denied, !possible(asked)) << bits;
      if (possible(asked)) {
        EXPECT_EQ(choice.way, asked) << bits;
        EXPECT_EQ(choice.reason, "asked for");
      } else {
        EXPECT_THAT(choice.reason, ::testing::Not(HasSubstr("asked for"))) << bits;
        EXPECT_FALSE(choice.reason.empty());
      }
    }
    EXPECT_FALSE(ChoosePageWay(PageWay::kAuto, facts).denied);
  }
}

}  // namespace
}  // namespace icecache
