#include "common/extent_socket.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include "common/limits.h"

namespace icecache {
namespace {

using std::chrono::milliseconds;

class ExtentSocketTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string name = FreshExtentSocketName();
    listener_ = std::move(ListenExtents(name)).value();
    EXPECT_FALSE(AcceptExtents(listener_.get()).valid()) << "nobody has connected";
    client_ = std::move(ConnectExtents(name)).value();
    server_ = AcceptExtents(listener_.get());
    ASSERT_TRUE(server_.valid());
  }
  OwnedFd listener_, client_, server_;
};

TEST_F(ExtentSocketTest, ARequestArrivesAsItWasSent) {
  ExtentRequest sent;
  sent.ticket = {std::byte{1}, std::byte{2}, std::byte{3}};
  sent.serials = {7, 1ull << 40};
  ASSERT_TRUE(SendExtentRequest(client_.get(), sent).ok());
  const auto got = ReceiveExtentRequest(server_.get());
  ASSERT_TRUE(got.ok()) << got.status().ToString();
  EXPECT_EQ(got->ticket, sent.ticket);
  EXPECT_EQ(got->serials, sent.serials);
  EXPECT_EQ(ReceiveExtentRequest(server_.get()).status().code(), StatusCode::kUnavailable);
}

TEST_F(ExtentSocketTest, DescriptorsArriveWithTheirSerials) {
  std::vector<OwnedFd> files;
  std::vector<int> fds;
  std::vector<uint64_t> serials;
  for (uint32_t i = 0; i < limits::kExtentsPerReplyMax; ++i) {
    files.emplace_back(::memfd_create("test", MFD_CLOEXEC));
    ASSERT_EQ(::write(files.back().get(), &i, sizeof(i)), static_cast<ssize_t>(sizeof(i)));
    fds.push_back(files.back().get());
    serials.push_back(1000 + i);
  }
  ASSERT_TRUE(SendExtents(server_.get(), StatusCode::kOk, serials, fds).ok());
  const auto lent = ReceiveExtents(client_.get(), milliseconds(1000));
  ASSERT_TRUE(lent.ok()) << lent.status().ToString();
  ASSERT_EQ(lent->size(), serials.size());
  for (uint32_t i = 0; i < lent->size(); ++i) {
    uint32_t value = ~0u;
    EXPECT_EQ((*lent)[i].serial, 1000 + i);
    ASSERT_EQ(::pread((*lent)[i].fd.get(), &value, sizeof(value), 0),
              static_cast<ssize_t>(sizeof(value)));
    EXPECT_EQ(value, i);
  }
}

TEST_F(ExtentSocketTest, ARefusalKeepsItsCodeAndSilenceEnds) {
  ASSERT_TRUE(SendExtents(server_.get(), StatusCode::kUnauthenticated, {}, {}).ok());
  EXPECT_EQ(ReceiveExtents(client_.get(), milliseconds(1000)).status().code(),
            StatusCode::kUnauthenticated);
  EXPECT_EQ(ReceiveExtents(client_.get(), milliseconds(1)).status().code(),
            StatusCode::kDeadlineExceeded);
  server_ = OwnedFd();
  EXPECT_EQ(ReceiveExtents(client_.get(), milliseconds(1000)).status().code(),
            StatusCode::kUnavailable);
}

TEST_F(ExtentSocketTest, WhatIsNoMessageIsRefused) {
  std::array<uint32_t, 4> header = {0x69636571, limits::kTicketBytesMax + 1, 0, 0};
  ASSERT_GT(::send(client_.get(), header.data(), sizeof(header), 0), 0);
  EXPECT_EQ(ReceiveExtentRequest(server_.get()).status().code(), StatusCode::kInvalidArgument);
  header = {0x69636571, 0, 3, 0};  // three serials that are not there
  ASSERT_GT(::send(client_.get(), header.data(), sizeof(header), 0), 0);
  EXPECT_EQ(ReceiveExtentRequest(server_.get()).status().code(), StatusCode::kInvalidArgument);
  ASSERT_GT(::send(client_.get(), header.data(), 3, 0), 0);
  EXPECT_EQ(ReceiveExtentRequest(server_.get()).status().code(), StatusCode::kInvalidArgument);
  header = {0x69636572, 0, 1, 0};  // a reply with one serial and no descriptor
  ASSERT_GT(::send(server_.get(), header.data(), sizeof(header), 0), 0);
  EXPECT_EQ(ReceiveExtents(client_.get(), milliseconds(1000)).status().code(),
            StatusCode::kDataLoss);
}

TEST(ExtentSocket, ANameThatNobodyListensUnderIsUnavailable) {
  EXPECT_EQ(ConnectExtents(FreshExtentSocketName()).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(ConnectExtents("").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ConnectExtents(std::string(200, 'x')).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
