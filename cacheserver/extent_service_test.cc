#include "cacheserver/extent_service.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "cacheserver/build_pool.h"
#include "common/extent_socket.h"
#include "common/limits.h"

namespace icecache {
namespace {

constexpr TenantId kAlice{1}, kBob{2};
constexpr uint32_t kFrameBytes = 4096;

std::vector<std::byte> Ticket(uint8_t value) {
  return std::vector<std::byte>(16, std::byte{value});
}

class ExtentServiceTest : public ::testing::Test {
 protected:
  ExtentServiceTest() : name_(service_.Listen()) {
    AddLease(kAlice, Ticket(1), Epoch(11));
    AddLease(kBob, Ticket(2), Epoch(12));
  }
  ~ExtentServiceTest() override {
    for (const auto& [tenant, frames] : frames_) shard_.pool().Release(tenant, kFrameBytes, frames);
  }
  void AddLease(TenantId tenant, std::vector<std::byte> ticket, Epoch epoch) {
    Lease lease;
    lease.epoch = epoch;
    lease.context = ContextId(epoch.value);
    lease.tenant = tenant;
    lease.ticket = std::move(ticket);
    shard_.AddLease(lease);
  }
  // One frame with this text in it.
  void Write(TenantId tenant, const char* text) {
    std::vector<Frame>& frames = frames_[tenant];
    ASSERT_TRUE(shard_.pool().Reserve(tenant, kFrameBytes, 1, &frames).ok());
    std::strcpy(reinterpret_cast<char*>(frames.back().data), text);
  }
  Result<std::vector<LentExtent>> Ask(const OwnedFd& socket, std::vector<std::byte> ticket,
                                      std::vector<uint64_t> serials = {}) {
    EXPECT_TRUE(SendExtentRequest(socket.get(), {std::move(ticket), std::move(serials)}).ok());
    for (int i = 0; i < 10; ++i) reactor_.Poll();
    return ReceiveExtents(socket.get(), std::chrono::milliseconds(100));
  }
  static std::string Text(const LentExtent& extent) {
    void* base = ::mmap(nullptr, limits::kExtentBytes, PROT_READ, MAP_SHARED, extent.fd.get(), 0);
    EXPECT_NE(base, MAP_FAILED);
    std::string text = static_cast<const char*>(base);
    ::munmap(base, limits::kExtentBytes);
    return text;
  }

  ManualClock clock_;
  Reactor reactor_{clock_, Duration(0)};
  BuildPool builds_{1};
  MetricsRegistry metrics_;
  Shard shard_{{.memory_bytes = 8 * limits::kExtentBytes}, reactor_, builds_, metrics_};
  ExtentService service_{shard_, reactor_, metrics_};
  const std::string name_;
  std::map<TenantId, std::vector<Frame>> frames_;
};

TEST_F(ExtentServiceTest, ATenantSeesItsOwnExtentsAndNoOthers) {
  Write(kAlice, "alice");
  Write(kBob, "bob");
  const OwnedFd alice = std::move(ConnectExtents(name_)).value();
  const OwnedFd bob = std::move(ConnectExtents(name_)).value();
  const auto of_alice = Ask(alice, Ticket(1));
  const auto of_bob = Ask(bob, Ticket(2));
  ASSERT_TRUE(of_alice.ok()) << of_alice.status().ToString();
  ASSERT_TRUE(of_bob.ok()) << of_bob.status().ToString();
  ASSERT_EQ(of_alice->size(), 1u);
  ASSERT_EQ(of_bob->size(), 1u);
  EXPECT_NE((*of_alice)[0].serial, (*of_bob)[0].serial);
  EXPECT_EQ(Text((*of_alice)[0]), "alice");
  EXPECT_EQ(Text((*of_bob)[0]), "bob");
  // Knowing the other's serial does not help.
  const auto guessed = Ask(alice, Ticket(1), {(*of_bob)[0].serial});
  ASSERT_TRUE(guessed.ok());
  EXPECT_TRUE(guessed->empty());
}

TEST_F(ExtentServiceTest, OnlyATicketOfALivingLeaseIsServed) {
  Write(kAlice, "alice");
  const OwnedFd socket = std::move(ConnectExtents(name_)).value();
  EXPECT_EQ(Ask(socket, Ticket(9)).status().code(), StatusCode::kUnauthenticated);
  EXPECT_EQ(Ask(socket, {}).status().code(), StatusCode::kUnauthenticated);
  EXPECT_TRUE(Ask(socket, Ticket(1)).ok());
  shard_.EndLease(Epoch(11));
  EXPECT_EQ(Ask(socket, Ticket(1)).status().code(), StatusCode::kUnauthenticated);
}

TEST_F(ExtentServiceTest, WhatIsLentCannotBeWritten) {
  Write(kAlice, "alice");
  const OwnedFd socket = std::move(ConnectExtents(name_)).value();
  const auto lent = Ask(socket, Ticket(1));
  ASSERT_TRUE(lent.ok() && lent->size() == 1);
  const int fd = (*lent)[0].fd.get();
  EXPECT_EQ(::mmap(nullptr, limits::kExtentBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0),
            MAP_FAILED);
  // Not through a descriptor of one's own either.
  const OwnedFd again(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR));
  if (again.valid()) {
    EXPECT_EQ(
        ::mmap(nullptr, limits::kExtentBytes, PROT_READ | PROT_WRITE, MAP_SHARED, again.get(), 0),
        MAP_FAILED);
    EXPECT_LT(::pwrite(again.get(), "x", 1, 0), 0);
    EXPECT_NE(::ftruncate(again.get(), 0), 0);
  }
  EXPECT_EQ(Text((*lent)[0]), "alice");
}

TEST_F(ExtentServiceTest, ExtentsThatCameLaterAreFoundBySerial) {
  const OwnedFd socket = std::move(ConnectExtents(name_)).value();
  const auto none = Ask(socket, Ticket(1));
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE(none->empty());
  Write(kAlice, "later");
  const uint64_t serial = shard_.pool().ExtentSerial(frames_[kAlice].back().extent);
  const auto lent = Ask(socket, Ticket(1), {serial});
  ASSERT_TRUE(lent.ok() && lent->size() == 1);
  EXPECT_EQ((*lent)[0].serial, serial);
  EXPECT_EQ(Text((*lent)[0]), "later");
}

TEST_F(ExtentServiceTest, NonsenseEndsItsConnectionAndNoOther) {
  const OwnedFd bad = std::move(ConnectExtents(name_)).value();
  const OwnedFd good = std::move(ConnectExtents(name_)).value();
  for (int i = 0; i < 10; ++i) reactor_.Poll();
  EXPECT_EQ(service_.connection_count(), 2u);
  ASSERT_GT(::write(bad.get(), "nonsense", 8), 0);
  for (int i = 0; i < 10; ++i) reactor_.Poll();
  EXPECT_EQ(service_.connection_count(), 1u);
  EXPECT_TRUE(Ask(good, Ticket(1)).ok());
}

}  // namespace
}  // namespace icecache
