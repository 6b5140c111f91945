#include "cacheserver/context/frame_table.h"

#include <gtest/gtest.h>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr TenantId kAlice(0), kBob(1);

wire::ShareFrames Frames(const std::string& host, int n) {
  return {host, {static_cast<std::byte>(n)}, {static_cast<std::byte>(n), std::byte{1}}};
}

// Which frames the worker is told of.
std::vector<int> Told(FrameTable& table, TenantId tenant, uint64_t connection,
                      const wire::ShareFrames& request) {
  std::vector<int> told;
  const auto list = table.Share(tenant, ConnectionId(connection), request);
  for (const auto& frames : list.value().others) {
    EXPECT_EQ(frames.directory[0], frames.memory[0]);
    told.push_back(static_cast<int>(frames.memory[0]));
  }
  return told;
}
using List = std::vector<int>;

TEST(FrameTable, WorkersOfATenantOnAHostAreToldOfEachOther) {
  FrameTable table;
  EXPECT_EQ(Told(table, kAlice, 1, Frames("a", 1)), List{});
  EXPECT_EQ(Told(table, kAlice, 2, Frames("a", 2)), List{1});
  EXPECT_EQ(Told(table, kAlice, 1, Frames("a", 1)), List{2});
  EXPECT_EQ(Told(table, kAlice, 3, Frames("b", 3)), List{});   // another host
  EXPECT_EQ(Told(table, kAlice, 4, {"a", {}}), (List{1, 2}));  // shares nothing itself
  EXPECT_EQ(table.count(), 3u);
}

TEST(FrameTable, AnotherTenantIsToldOfNothing) {
  FrameTable table;
  (void)Told(table, kAlice, 1, Frames("a", 1));
  EXPECT_EQ(Told(table, kBob, 2, Frames("a", 2)), List{});
  EXPECT_EQ(Told(table, kAlice, 1, Frames("a", 1)), List{});
}

TEST(FrameTable, WhatEndsIsToldNoMore) {
  FrameTable table;
  (void)Told(table, kAlice, 1, Frames("a", 1));
  (void)Told(table, kAlice, 2, Frames("a", 2));
  table.EndConnection(ConnectionId(1));
  EXPECT_EQ(Told(table, kAlice, 3, Frames("a", 3)), List{2});
  EXPECT_EQ(Told(table, kAlice, 2, {"a", {}}), List{3});  // and takes its own back
  EXPECT_EQ(Told(table, kAlice, 3, Frames("a", 3)), List{});
}

TEST(FrameTable, OtherFramesOfAWorkerHaveAnotherId) {
  FrameTable table;
  const auto id = [&] { return table.Share(kAlice, ConnectionId(9), {"a", {}})->others.at(0).id; };
  (void)Told(table, kAlice, 1, Frames("a", 1));
  const uint64_t first = id();
  (void)Told(table, kAlice, 1, Frames("a", 1));
  EXPECT_EQ(id(), first);
  (void)Told(table, kAlice, 1, Frames("a", 2));
  EXPECT_NE(id(), first);
}

TEST(FrameTable, AHostTakesSoManyWorkersOfATenant) {
  FrameTable table;
  for (uint64_t c = 0; c < limits::kSharingWorkersMax; ++c) {
    ASSERT_TRUE(table.Share(kAlice, ConnectionId(c), Frames("a", 1)).ok());
  }
  const auto refused = table.Share(kAlice, ConnectionId(99), Frames("a", 1));
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(table.Share(kAlice, ConnectionId(0), Frames("a", 1)).ok());
  EXPECT_TRUE(table.Share(kBob, ConnectionId(99), Frames("a", 1)).ok());
}

}  // namespace
}  // namespace icecache
