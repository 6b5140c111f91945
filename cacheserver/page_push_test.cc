// Pages that a server writes into memory of an (emulated) GPU: where it writes, for whom, until
// when; and what it does not take for such memory.
#include "cacheserver/page_push.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "cacheserver/test_worker.h"
#include "common/shared_memory.h"
#include "common/wire/push_codec.h"
#include "kernels/gpu/memory_handle.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kTokens = 300, kPages = 6;
constexpr std::byte kUntouched{0xab};

// Memory of a device of this process, and its name.
struct Offered {
  explicit Offered(gpu::Device& device, size_t bytes = limits::kPushBytes)
      : memory(gpu::DeviceMemory::Allocate(device, gpu::MemoryKind::kShared, bytes).value()),
        handle(device.Export(memory.data()).value()) {
    Clear();
  }
  void Clear() { std::fill_n(memory.data(), memory.bytes(), kUntouched); }
  gpu::DeviceMemory memory;
  std::vector<std::byte> handle;
};

class PagePushTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
    EXPECT_TRUE(alice_.Create("doc", "sequential").ok());
    EXPECT_TRUE(alice_.Prefill(kTokens).ok());
  }
  static Status Offer(DataClient& shard, const std::vector<std::byte>& ticket,
                      const std::vector<std::byte>& handle) {
    OutMessage out;
    wire::Encode(wire::OfferMemoryRequest{ticket, handle}, &out);
    const Result<OwnedMessage> reply = shard.Call(std::move(out));
    return reply.ok() ? wire::DecodeOfferMemoryReply(reply->view()).status() : reply.status();
  }
  Status Offer(const Offered& offered) {
    for (size_t i = 0; i < kShards; ++i) {
      KV_RETURN_IF_ERROR(Offer(alice_.shard(i), alice_.grant().ticket, offered.handle));
    }
    return OkStatus();
  }
  Result<Worker::Selected> Select(uint32_t push_offset, uint32_t push_bytes, uint8_t flags = 0) {
    wire::SelectRequest request;
    request.context = alice_.grant().context.id;
    request.epoch = alice_.grant().epoch;
    request.layer = LayerId(0);
    request.heads = {{.head = KvHeadId(0), .resident = {}, .local_lse = {}}};
    request.max_pages = kPages;
    request.flags = flags;
    request.append_first = kTokens - kWindow;
    request.push_offset = push_offset;
    request.push_bytes = push_bytes;
    OutMessage out;
    wire::Encode(request, &out);
    const std::vector<float> queries = alice_.rows(0, 0).Queries(1, kShape.group(), kTokens);
    out.body.push_back(std::as_bytes(std::span(queries)));
    Worker::Selected selected;
    KV_ASSIGN_OR_RETURN(selected.message, alice_.shard_of(0, 0).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(selected.reply, wire::DecodeSelectReply(selected.message.view(), kShape));
    return selected;
  }
  // Of the reply's pages that are intact, those that were pushed; all have to be intact.
  static uint32_t CountPushed(const wire::SelectReply& reply, const Offered& offered,
                              uint32_t begin, uint32_t end) {
    uint32_t pushed = 0;
    for (const wire::PagePayload& page : reply.heads[0].pages) {
      std::span<const std::byte> k = page.k_rows, v = page.v_rows;
      if (page.place == wire::PagePlace::kPushed) {
        const size_t bytes = page.fill * kShape.row_bytes();
        EXPECT_GE(page.offset, begin);
        EXPECT_LE(page.offset + 2 * bytes, end);
        k = {offered.memory.data(page.offset), bytes};
        v = {offered.memory.data(page.offset + bytes), bytes};
        ++pushed;
      }
      EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version}, k,
                                            v, page.positions));
    }
    EXPECT_EQ(reply.heads[0].pages.size(), kPages);
    return pushed;
  }
  static bool Untouched(const Offered& offered, size_t begin, size_t end) {
    return std::all_of(offered.memory.data(begin), offered.memory.data(end),
                       [](std::byte b) { return b == kUntouched; });
  }
  int Targets() const {
    const std::string name = "\nicecache_push_targets ";
    const std::string page = server_.Page("/metrics");
    const size_t at = page.find(name);
    return at == std::string::npos ? -1 : std::atoi(page.c_str() + at + name.size());
  }
  bool WaitForTargets(int count) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (Targets() != count && std::chrono::steady_clock::now() < limit) {
      alice_.reactor().RunUntil([] { return false; },
                                alice_.reactor().clock().Now() + std::chrono::milliseconds(50));
    }
    return Targets() == count;
  }

  std::unique_ptr<gpu::Device> device_ = gpu::MakeEmulatedDevice({});
  RunningServer server_{test::TwoTenants(), "emulated"};
  Worker alice_{server_.address(), 1, "alice", "alice"};
};

TEST_F(PagePushTest, PagesAreWrittenIntoTheRegionAndNowhereElse) {
  Offered offered(*device_);
  ASSERT_EQ(Offer(offered).ToString(), "OK");
  const uint32_t begin = 1 << 20, end = begin + (64 << 10);
  const auto selected = Select(begin, end - begin);
  ASSERT_TRUE(selected.ok()) << selected.status().ToString();
  EXPECT_EQ(CountPushed(selected->reply, offered, begin, end), kPages);
  EXPECT_TRUE(Untouched(offered, 0, begin) && Untouched(offered, end, offered.memory.bytes()));
  EXPECT_FALSE(Untouched(offered, begin, end));
  // Nothing is written that no request has lent.
  offered.Clear();
  const auto plain = Select(0, 0);
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(CountPushed(plain->reply, offered, 0, 0), 0u);
  EXPECT_TRUE(Untouched(offered, 0, offered.memory.bytes()));
}

// In the body, or named in the extents of the tenant, as the request wants it.
TEST_F(PagePushTest, WhatDoesNotFitComesAsItWould) {
  Offered offered(*device_);
  ASSERT_TRUE(Offer(offered).ok());
  const uint32_t page = 2 * limits::kPageTokens * static_cast<uint32_t>(kShape.row_bytes());
  const auto some = Select(256, 2 * page + 100);
  ASSERT_TRUE(some.ok());
  EXPECT_EQ(CountPushed(some->reply, offered, 256, 256 + 2 * page + 100), 2u);
  const auto mapped = Select(256, 2 * page, wire::kSelectMapped);
  ASSERT_TRUE(mapped.ok());
  std::map<wire::PagePlace, int> places;
  for (const wire::PagePayload& p : mapped->reply.heads[0].pages) ++places[p.place];
  EXPECT_EQ(places[wire::PagePlace::kPushed], 2);
  EXPECT_EQ(places[wire::PagePlace::kMapped], static_cast<int>(kPages) - 2);
}

TEST_F(PagePushTest, ARegionBeyondTheMemoryIsNotWritten) {
  Offered offered(*device_, gpu::kSharedUnit);
  ASSERT_TRUE(Offer(offered).ok());
  const auto selected = Select(static_cast<uint32_t>(offered.memory.bytes()) - 4096, 64 << 10);
  ASSERT_TRUE(selected.ok());
  EXPECT_EQ(CountPushed(selected->reply, offered, 0, 0), 0u);
  EXPECT_TRUE(Untouched(offered, 0, offered.memory.bytes()));
}

TEST_F(PagePushTest, OnlyWhoHasAttachedMayOffer) {
  Offered offered(*device_);
  Worker bob(server_.address(), 2, "bob", "bob");
  const std::vector<std::byte>& ticket = alice_.grant().ticket;
  EXPECT_EQ(Offer(bob.shard(0), ticket, offered.handle).code(), StatusCode::kPermissionDenied);
  ASSERT_TRUE(bob.Create("own", "sequential").ok());
  EXPECT_EQ(Offer(bob.shard(0), ticket, offered.handle).code(), StatusCode::kPermissionDenied);
  EXPECT_EQ(Offer(alice_.shard(0), bob.grant().ticket, offered.handle).code(),
            StatusCode::kPermissionDenied);
  EXPECT_EQ(Offer(alice_.shard(0), {std::byte{1}}, offered.handle).code(),
            StatusCode::kPermissionDenied);
  EXPECT_EQ(Targets(), 0);
}

TEST_F(PagePushTest, AServerThatPushesNothingTakesNoMemory) {
  const Offered offered(*device_);
  RunningServer other(test::TwoTenants());
  Worker worker(other.address(), 4, "alice", "alice");
  ASSERT_TRUE(worker.Create("doc", "sequential").ok());
  const Status status = Offer(worker.shard(0), worker.grant().ticket, offered.handle);
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("pushes no pages"));
}

TEST_F(PagePushTest, ForgedHandlesAreRefused) {
  Offered offered(*device_);
  const gpu::MemoryHandle real = gpu::DecodeMemoryHandle(offered.handle).value();
  const auto refused = [&](const std::vector<std::byte>& handle) {
    const Status status = Offer(alice_.shard(0), alice_.grant().ticket, handle);
    EXPECT_FALSE(status.ok());
    return status.message();
  };
  const auto forged = [&](const std::function<void(SharedMemoryName*)>& change,
                          uint64_t bytes = 0) {
    gpu::MemoryHandle handle = real;
    SharedMemoryName name;
    std::memcpy(&name, handle.name.data(), sizeof(name));
    change(&name);
    std::memcpy(handle.name.data(), &name, sizeof(name));
    if (bytes > 0) handle.bytes = bytes;
    return gpu::EncodeMemoryHandle(handle);
  };
  EXPECT_THAT(refused(forged([](auto* n) { n->nonce[1] ^= 1; })), HasSubstr("forged"));
  EXPECT_THAT(refused(forged([](auto* n) { n->descriptor = 1; })), HasSubstr("forged"));
  EXPECT_THAT(refused(forged([](auto* n) { n->descriptor = 1 << 20; })), HasSubstr("gone"));
  EXPECT_THAT(refused(forged([](auto* n) { n->process = 0; })), HasSubstr("gone"));
  EXPECT_THAT(refused(forged([](auto*) {}, 2 * real.bytes)), HasSubstr("forged"));
  gpu::MemoryHandle other = real;
  other.kind = gpu::MemoryHandle::Kind::kCuda;
  EXPECT_THAT(refused(gpu::EncodeMemoryHandle(other)), HasSubstr("emulated"));
  EXPECT_THAT(refused({offered.handle.begin(), offered.handle.end() - 1}), HasSubstr("bytes"));
  std::vector<std::byte> elsewhere = offered.handle;
  elsewhere[10] ^= std::byte{1};  // the boot
  EXPECT_THAT(refused(elsewhere), HasSubstr("another machine"));
  Offered large(*device_, limits::kPushBytes + 1);
  EXPECT_THAT(refused(large.handle), HasSubstr("at most"));
  EXPECT_EQ(Targets(), 0);
  // The connection is as good as before.
  EXPECT_EQ(Offer(offered).ToString(), "OK");
}

TEST_F(PagePushTest, AnOfferEndsWithItsLease) {
  Offered offered(*device_);
  ASSERT_TRUE(Offer(offered).ok());
  EXPECT_EQ(Targets(), static_cast<int>(kShards));
  ASSERT_TRUE(alice_.control().Do(wire::Release{alice_.grant().context.id}).ok());
  EXPECT_FALSE(Select(0, 64 << 10).ok());
  EXPECT_TRUE(Untouched(offered, 0, offered.memory.bytes()));
  EXPECT_TRUE(WaitForTargets(0));
}

TEST_F(PagePushTest, AnOfferEndsWithItsConnection) {
  Offered offered(*device_);
  {
    Worker other(server_.address(), 3, "alice", "alice");
    ASSERT_TRUE(other.Create("own", "sequential").ok());
    ASSERT_TRUE(Offer(other.shard(0), other.grant().ticket, offered.handle).ok());
    EXPECT_EQ(Targets(), 1);
  }
  EXPECT_TRUE(WaitForTargets(0));
}

// A handle may name any GPU; those that are not there take no threads from those that are.
TEST_F(PagePushTest, HandlesOfUnknownGpusLeaveNothingBehind) {
  ManualClock clock;
  Reactor reactor(clock, Duration(0));
  MetricsRegistry metrics;
  PagePool pool(limits::kPoolBytesMin);
  bool there = false;
  PagePush push(pool, reactor, metrics,
                [&there](const gpu::MemoryHandle&) -> Result<std::unique_ptr<gpu::Device>> {
                  if (!there) return Unavailable("no such GPU");
                  return gpu::MakeEmulatedDevice({});
                });
  const Offered offered(*device_);
  const auto open = [&](const std::vector<std::byte>& handle) {
    std::optional<Status> answer;
    push.Open(handle, [&](const Result<std::shared_ptr<PushTarget>>& target) {
      answer = target.ok() ? OkStatus() : target.status();
    });
    while (!answer) reactor.Poll();
    return *answer;
  };
  for (uint8_t id = 1; id < 3 * limits::kPushDevicesMax; ++id) {
    gpu::MemoryHandle handle;
    handle.device[0] = std::byte{id};
    EXPECT_THAT(open(gpu::EncodeMemoryHandle(handle)).message(), HasSubstr("no such GPU"));
  }
  there = true;
  EXPECT_EQ(open(offered.handle).ToString(), "OK");
}

// What the device has registered of an extent goes with it, and what takes its place is read anew.
TEST_F(PagePushTest, ExtentsComeAndGo) {
  Offered offered(*device_);
  ASSERT_TRUE(Offer(offered).ok());
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    const auto selected = Select(0, 64 << 10);
    ASSERT_TRUE(selected.ok()) << selected.status().ToString();
    EXPECT_EQ(CountPushed(selected->reply, offered, 0, 64 << 10), kPages);
    ASSERT_TRUE(alice_.control().Do(wire::Release{alice_.grant().context.id}).ok());
    ASSERT_TRUE(alice_.Create("doc" + std::to_string(round), "sequential").ok());
    ASSERT_TRUE(alice_.Prefill(kTokens).ok());
    ASSERT_TRUE(Offer(offered).ok());  // the last lease has ended in between
    offered.Clear();
  }
}

}  // namespace
}  // namespace icecache
