#include "cacheserver/control_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "cacheserver/test_client.h"
#include "common/limits.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32, .dtype = DType::kF32};

// The control plane over two shards, all on the test's thread and on the test's time; the sockets
// are real.
class ControlServiceTest : public ::testing::Test {
 protected:
  ControlServiceTest() {
    QuietLog();
    std::vector<ShardGroup::Member> members;
    for (uint16_t i = 0; i < 2; ++i) {
      shards_.push_back(std::make_unique<Shard>(
          ShardOptions{.id = ShardId(i), .count = 2, .memory_bytes = 64u << 20}, reactor_, builds_,
          metrics_));
      members.push_back({&reactor_, shards_.back().get()});
    }
    group_ = std::make_unique<ShardGroup>(reactor_, std::move(members));
    contexts_ = std::make_unique<ContextService>(*group_, tenants_, leases_, metrics_);
    service_ = std::make_unique<ControlService>(
        reactor_, *contexts_, tenants_, metrics_,
        ControlServiceOptions{.shards = {"127.0.0.1:1", "127.0.0.1:2"},
                              .lease_time = milliseconds(1000)});
    address_ = *service_->Listen("127.0.0.1", 0);
  }
  std::unique_ptr<ControlClient> Connect() {
    return std::make_unique<ControlClient>(address_, [this] { Turn(); });
  }
  std::unique_ptr<ControlClient> Hello(const std::string& tenant = "",
                                       const std::string& secret = "") {
    auto client = Connect();
    EXPECT_TRUE(client->Hello(tenant, secret).ok());
    return client;
  }
  void Turn() {
    while (reactor_.Poll()) {
    }
  }
  // Lets the service notice what sockets did: real time, as sockets are real.
  template <typename Condition>
  bool Eventually(const Condition& condition) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (!condition()) {
      if (std::chrono::steady_clock::now() > limit) return false;
      Turn();
    }
    return true;
  }
  wire::Create Create(const std::string& name) {
    return {.name = name,
            .shape = kShape,
            .model = "tiny",
            .sink_tokens = 4,
            .window_tokens = 8,
            .policy = "exact"};
  }
  uint64_t Leases() const { return shards_[0]->status().leases + shards_[1]->status().leases; }
  uint64_t Contexts() const {
    return shards_[0]->status().contexts + shards_[1]->status().contexts;
  }

  ManualClock clock_;
  Reactor reactor_{clock_, Duration::zero()};
  MetricsRegistry metrics_;
  BuildPool builds_{1};
  TenantTable tenants_ = TenantTable::Open();
  LeaseTable leases_{clock_, milliseconds(1000), Epoch(1)};
  std::vector<std::unique_ptr<Shard>> shards_;
  std::unique_ptr<ShardGroup> group_;
  std::unique_ptr<ContextService> contexts_;
  std::unique_ptr<ControlService> service_;
  std::string address_;
};

TEST_F(ControlServiceTest, HelloTellsTheDataAddresses) {
  auto client = Connect();
  Result<wire::HelloReply> hello = client->Hello();
  ASSERT_TRUE(hello.ok()) << hello.status().ToString();
  EXPECT_EQ(hello->shards, (std::vector<std::string>{"127.0.0.1:1", "127.0.0.1:2"}));
  EXPECT_EQ(client->Hello().status().code(), StatusCode::kInvalidArgument);  // once is enough
  EXPECT_TRUE(client->Do(wire::Renew{}).ok());
}

TEST_F(ControlServiceTest, NothingWorksBeforeHello) {
  auto client = Connect();
  EXPECT_EQ(client->Do(wire::Renew{}).code(), StatusCode::kUnauthenticated);
  EXPECT_TRUE(client->WaitClosed());
}

TEST_F(ControlServiceTest, OtherProtocolVersionIsRefused) {
  auto client = Connect();
  Result<wire::HelloReply> hello =
      client->Call<wire::HelloReply>(wire::Hello{.protocol_version = 99});
  EXPECT_EQ(hello.status().code(), StatusCode::kUnimplemented);
  EXPECT_TRUE(client->WaitClosed());
}

TEST_F(ControlServiceTest, GrantIsOnAllShardsWhenItArrives) {
  auto client = Hello();
  Result<wire::Grant> grant = client->Call<wire::Grant>(Create("doc"));
  ASSERT_TRUE(grant.ok()) << grant.status().ToString();
  EXPECT_EQ(grant->context.name, "doc");
  EXPECT_EQ(grant->context.tenant, "default");
  EXPECT_EQ(grant->context.shape, kShape);
  EXPECT_EQ(grant->lease_ms, 1000u);
  ASSERT_EQ(grant->ticket.size(), kTicketBytes);
  for (const auto& shard : shards_) {
    const Lease* lease = shard->FindTicket(grant->ticket);
    ASSERT_NE(lease, nullptr);
    EXPECT_EQ(lease->epoch, grant->epoch);
    EXPECT_TRUE(lease->writable);
    EXPECT_NE(shard->FindContext(grant->context.id), nullptr);
  }
  EXPECT_EQ(client->Call<wire::Grant>(Create("doc")).status().code(), StatusCode::kAlreadyExists);
  wire::Create bad = Create("x");
  bad.policy = "magic";
  EXPECT_EQ(client->Call<wire::Grant>(bad).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(ControlServiceTest, PrivateContextIsUnknownToOthersUntilPublished) {
  auto anna = Hello(), ben = Hello();
  const wire::Grant grant = *anna->Call<wire::Grant>(Create("doc"));
  EXPECT_EQ(ben->Call<wire::Grant>(wire::Open{"doc"}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(ben->Call<wire::Grant>(wire::Fork{"doc", "mine"}).status().code(),
            StatusCode::kNotFound);
  EXPECT_EQ(ben->Do(wire::Seal{grant.context.id}).code(), StatusCode::kNotFound);
  EXPECT_EQ(anna->Do(wire::Publish{grant.context.id}).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(ben->Do(wire::Publish{grant.context.id}).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(anna->Call<wire::Grant>(wire::Fork{"doc", "early"}).status().code(),
            StatusCode::kFailedPrecondition);
  EXPECT_TRUE(anna->Do(wire::Seal{grant.context.id}).ok());
  EXPECT_TRUE(anna->Do(wire::Seal{grant.context.id}).ok());
  EXPECT_TRUE(
      anna->Call<wire::Grant>(wire::Fork{"doc", "own"}).ok());  // its creator may fork it already
  // The right to share is the tenant's: another of its connections keeps what anna has sealed.
  EXPECT_TRUE(ben->Do(wire::Publish{grant.context.id}).ok());
  EXPECT_TRUE(anna->Do(wire::Publish{grant.context.id}).ok());
  Result<wire::Grant> reader = ben->Call<wire::Grant>(wire::Open{"doc"});
  ASSERT_TRUE(reader.ok());
  EXPECT_GT(reader->epoch, grant.epoch);
  EXPECT_FALSE(shards_[0]->FindLease(reader->epoch)->writable);
  Result<wire::Grant> fork = ben->Call<wire::Grant>(wire::Fork{"doc", "mine"});
  ASSERT_TRUE(fork.ok());
  ASSERT_EQ(fork->context.segments.size(), 2u);
  EXPECT_EQ(fork->context.segments[0].references, 3u);
  // A reader's lease seals nothing.
  EXPECT_EQ(ben->Do(wire::Seal{reader->context.id}).code(), StatusCode::kPermissionDenied);
}

TEST_F(ControlServiceTest, DisconnectEndsLeasesAndPrivateContexts) {
  auto client = Hello(), other = Hello();
  const wire::Grant kept = *client->Call<wire::Grant>(Create("kept"));
  ASSERT_TRUE(client->Do(wire::Seal{kept.context.id}).ok());
  ASSERT_TRUE(client->Do(wire::Publish{kept.context.id}).ok());
  ASSERT_TRUE(client->Call<wire::Grant>(Create("gone")).ok());
  EXPECT_EQ(Leases(), 4u);
  EXPECT_EQ(Contexts(), 4u);
  client->Close();
  EXPECT_TRUE(Eventually([&] { return Leases() == 0; }));
  EXPECT_EQ(Contexts(), 2u);
  const wire::ContextList list = *other->Call<wire::ContextList>(wire::List{});
  ASSERT_EQ(list.contexts.size(), 1u);
  EXPECT_EQ(list.contexts[0].name, "kept");
  EXPECT_EQ(service_->connection_count(), 1u);
}

TEST_F(ControlServiceTest, LeasesLiveByRenewAndDieBySilence) {
  auto client = Hello(), silent = Hello();
  const wire::Grant kept = *client->Call<wire::Grant>(Create("kept"));
  const wire::Grant lost = *silent->Call<wire::Grant>(Create("lost"));
  for (int i = 0; i < 6; ++i) {
    clock_.Advance(milliseconds(300));
    EXPECT_TRUE(client->Do(wire::Renew{}).ok());
  }
  EXPECT_NE(shards_[1]->FindLease(kept.epoch), nullptr);
  EXPECT_EQ(shards_[1]->FindLease(lost.epoch), nullptr);
  EXPECT_EQ(shards_[1]->FindContext(lost.context.id), nullptr);
  EXPECT_TRUE(silent->WaitClosed());  // half-open connections end, too
}

TEST_F(ControlServiceTest, ReleaseAndDropFreeBeforeTheyAnswer) {
  auto client = Hello();
  const wire::Grant a = *client->Call<wire::Grant>(Create("a"));
  const wire::Grant b = *client->Call<wire::Grant>(Create("b"));
  EXPECT_TRUE(client->Do(wire::Release{a.context.id}).ok());
  EXPECT_EQ(shards_[0]->FindContext(a.context.id), nullptr);
  EXPECT_EQ(client->Do(wire::Release{a.context.id}).code(), StatusCode::kNotFound);
  EXPECT_TRUE(client->Do(wire::Drop{"b"}).ok());
  EXPECT_EQ(shards_[0]->FindLease(b.epoch), nullptr);  // fenced
  EXPECT_EQ(client->Do(wire::Drop{"b"}).code(), StatusCode::kNotFound);
  EXPECT_EQ(Contexts(), 0u);
}

// Found by chaos: a list of none, which clients took for a broken server.
TEST_F(ControlServiceTest, AContextThatEndsWhileItIsDescribedIsNotFound) {
  auto client = Hello();
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(client->Call<wire::Grant>(Create("doc")).ok());
    std::vector<std::byte> both;
    for (const auto& frame : {wire::EncodeFrame(wire::ControlRequest{500, wire::Describe{"doc"}}),
                              wire::EncodeFrame(wire::ControlRequest{501, wire::Drop{"doc"}})}) {
      both.insert(both.end(), frame.begin(), frame.end());
    }
    client->SendBytes(both);
    for (int replies = 0; replies < 2; ++replies) {
      const Result<wire::ControlReply> reply = client->Receive();
      ASSERT_TRUE(reply.ok());
      if (reply->id != 500) continue;
      if (const Status* error = std::get_if<Status>(&reply->body)) {
        EXPECT_EQ(error->code(), StatusCode::kNotFound);
      } else {
        EXPECT_EQ(std::get<wire::ContextList>(reply->body).contexts.size(), 1u);
      }
    }
  }
}

TEST_F(ControlServiceTest, HelloMustComeInTime) {
  auto client = Connect();
  ASSERT_TRUE(Eventually([&] { return service_->connection_count() == 1; }));
  clock_.Advance(limits::kHelloTimeout + milliseconds(1000));
  EXPECT_TRUE(client->WaitClosed());
}

TEST_F(ControlServiceTest, DrainRefusesNewWorkAndFinishesOld) {
  auto client = Hello();
  const wire::Grant grant = *client->Call<wire::Grant>(Create("doc"));
  contexts_->StopAdmitting();
  service_->StopAccepting();
  EXPECT_EQ(client->Call<wire::Grant>(Create("late")).status().code(), StatusCode::kUnavailable);
  EXPECT_TRUE(client->Do(wire::Seal{grant.context.id}).ok());
  EXPECT_TRUE(client->Do(wire::Publish{grant.context.id}).ok());
  EXPECT_FALSE(Connect()->Hello().ok());
}

TEST_F(ControlServiceTest, TenantsDoNotSeeEachOther) {
  const std::string bob_alone = test::TenantEntry("bob", "b", R"(rights = ["read", "share"])");
  tenants_ = *TenantTable::Parse(test::TenantEntry("alice", "a") + bob_alone, "t");
  EXPECT_EQ(Connect()->Hello("alice", "b").status().code(), StatusCode::kUnauthenticated);
  auto alice = Hello("alice", "a"), bob = Hello("bob", "b");
  const wire::Grant grant = *alice->Call<wire::Grant>(Create("doc"));
  ASSERT_TRUE(alice->Do(wire::Seal{grant.context.id}).ok());
  ASSERT_TRUE(alice->Do(wire::Publish{grant.context.id}).ok());
  EXPECT_EQ(bob->Call<wire::Grant>(wire::Open{"doc"}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(bob->Call<wire::ContextList>(wire::Describe{"doc"}).status().code(),
            StatusCode::kNotFound);
  EXPECT_TRUE(bob->Call<wire::ContextList>(wire::List{})->contexts.empty());
  EXPECT_EQ(bob->Do(wire::Release{grant.context.id}).code(), StatusCode::kNotFound);
  EXPECT_EQ(bob->Call<wire::Grant>(Create("x")).status().code(), StatusCode::kPermissionDenied);
  // A reload without alice ends her connections; her published context stays for her return.
  tenants_.Update(*TenantTable::Parse(bob_alone, "t"));
  service_->CloseInactiveTenants();
  EXPECT_TRUE(alice->WaitClosed());
  EXPECT_TRUE(bob->Do(wire::Renew{}).ok());
  EXPECT_EQ(Contexts(), 2u);
}

TEST_F(ControlServiceTest, OnlySoManyRequestsAreOpen) {
  auto client = Hello();
  constexpr uint32_t kMany = limits::kControlRequestsInFlightMax + 20;
  std::vector<std::byte> burst;
  for (uint32_t i = 0; i < kMany; ++i) {
    const auto frame = wire::EncodeFrame(wire::ControlRequest{1000 + i, wire::List{}});
    burst.insert(burst.end(), frame.begin(), frame.end());
  }
  client->SendBytes(burst);
  uint32_t answered = 0;
  for (uint32_t i = 0; i < kMany; ++i) {
    Result<wire::ControlReply> reply = client->Receive();
    ASSERT_TRUE(reply.ok());
    const Status* error = std::get_if<Status>(&reply->body);
    if (error != nullptr) {
      EXPECT_EQ(error->code(), StatusCode::kResourceExhausted);
    }
    ++answered;
  }
  EXPECT_EQ(answered, kMany);
  EXPECT_EQ(service_->requests_open(), 0u);
}

// Whatever bytes arrive, only the connection that sent them may end.
TEST_F(ControlServiceTest, BadFramesCloseTheirOwnConnectionOnly) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  auto good = Hello();
  const wire::Grant grant = *good->Call<wire::Grant>(Create("doc"));
  const std::vector<std::byte> sample = wire::EncodeFrame(wire::ControlRequest{7, Create("other")});
  for (int i = 0; i < 200; ++i) {
    auto bad = random() % 2 == 0 ? Connect() : Hello();
    std::vector<std::byte> bytes;
    if (random() % 2 == 0) {
      bytes.resize(1 + random() % 400);
      for (std::byte& b : bytes) b = static_cast<std::byte>(random());
      if (random() % 2 == 0) bytes[std::min<size_t>(2, bytes.size() - 1)] = std::byte{0};
    } else {
      bytes = sample;
      for (uint32_t n = 1 + random() % 5; n > 0; --n)
        bytes[random() % bytes.size()] ^= static_cast<std::byte>(1 << random() % 8);
      if (random() % 3 == 0) bytes.resize(random() % bytes.size());
    }
    bad->SendBytes(bytes);
    if (random() % 2 == 0) Turn();
    bad->Close();
    if (i % 20 == 0) {
      ASSERT_TRUE(good->Do(wire::Renew{}).ok());
    }
  }
  EXPECT_TRUE(Eventually([&] { return service_->connection_count() == 1; }));
  EXPECT_TRUE(good->Do(wire::Seal{grant.context.id}).ok());
  EXPECT_EQ(contexts_->lease_count(), 1u);
  EXPECT_EQ(service_->requests_open(), 0u);
}

TEST_F(ControlServiceTest, OversizedFrameIsAnsweredAndClosed) {
  auto client = Hello();
  const uint32_t words = static_cast<uint32_t>(limits::kControlMessageBytesMax / 8 + 1);
  client->SendBytes(std::as_bytes(std::span(&words, 1)));
  Result<wire::ControlReply> reply = client->Receive();
  ASSERT_TRUE(reply.ok());
  EXPECT_EQ(std::get<Status>(reply->body).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(client->WaitClosed());
}

TEST_F(ControlServiceTest, TakenPortIsRefusedWithTheRemedy) {
  const uint16_t port = ParseHostPort(address_)->port;
  ControlService second(reactor_, *contexts_, tenants_, metrics_, {});
  Result<std::string> listened = second.Listen("127.0.0.1", port);
  ASSERT_FALSE(listened.ok());
  EXPECT_THAT(listened.status().message(), HasSubstr("--port"));
  EXPECT_FALSE(second.Listen("203.0.113.1", 0).ok());
}

}  // namespace
}  // namespace icecache
