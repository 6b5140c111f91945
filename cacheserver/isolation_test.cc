// Two tenants on one server. What one of them tries to see, name, map or infer of the other's: by
// id, by ticket, by extent, by name, by what answers give away.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <thread>

#include "cacheserver/test_worker.h"
#include "common/extent_socket.h"
#include "common/wire/extent_codec.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TenantTable TwoTenantsAndTheirOperator() {
  return *TenantTable::Parse(
      test::TenantEntry("alice", "alice") + test::TenantEntry("bob", "bob") +
          test::TenantEntry("root", "root", R"(rights = ["read", "write", "share", "admin"])"),
      "test");
}

class Isolation : public ::testing::Test {
 protected:
  Isolation() : server_(TwoTenantsAndTheirOperator()) {
    EXPECT_TRUE(alice_.Create("doc", "exact").ok());
    EXPECT_TRUE(alice_.Prefill(300).ok());
    const ContextId doc = alice_.grant().context.id;
    EXPECT_TRUE(alice_.control().Do(wire::Seal{doc}).ok());
    EXPECT_TRUE(alice_.control().Do(wire::Publish{doc}).ok());
    EXPECT_TRUE(bob_.Create("own", "exact").ok());
    EXPECT_TRUE(bob_.Prefill(300).ok());
  }
  const wire::Grant& alices() const { return alice_.grant(); }

  // What bob's data connections answer when he uses these as if they were his.
  Status SelectAs(const wire::Grant& grant) {
    const wire::Grant own = bob_.grant();
    bob_.set_grant(grant);
    const std::vector<float> queries = bob_.rows(0, 0).Queries(1, kShape.group(), 300);
    const Status status = bob_.Select(0, 0, queries, 4, 300 - kWindow, 0).status();
    bob_.set_grant(own);
    return status;
  }
  std::string InspectAs(Worker& worker, wire::InspectTopic topic, const std::string& name = "") {
    const auto report = worker.control().Call<wire::Report>(wire::Inspect{topic, name});
    return report.ok() ? report->json : report.status().ToString();
  }

  RunningServer server_;
  Worker alice_{server_.address(), 1, "alice", "alice"};
  Worker bob_{server_.address(), 2, "bob", "bob"};
};

// The same words for what is another's and for what never was; `absent` stands for the latter.
std::string Without(std::string text, const std::string& word) {
  for (size_t at; (at = text.find(word)) != std::string::npos;) text.erase(at, word.size());
  return text;
}

TEST_F(Isolation, IdsOfOthersAnswerLikeIdsThatNeverWere) {
  const ContextId doc = alices().context.id, never(987654);
  const auto same = [&](auto make) {
    const Status other = bob_.control().Do(make(doc)), none = bob_.control().Do(make(never));
    EXPECT_FALSE(other.ok());
    EXPECT_EQ(other.code(), none.code());
    EXPECT_EQ(Without(other.message(), std::to_string(doc.value)),
              Without(none.message(), std::to_string(never.value)));
  };
  same([](ContextId id) { return wire::Seal{id}; });
  same([](ContextId id) { return wire::Publish{id}; });
  same([](ContextId id) { return wire::Release{id}; });
}

TEST_F(Isolation, NamesOfOthersAnswerLikeNamesThatNeverWere) {
  const auto same = [&](auto call) {
    const Status other = call("doc"), none = call("nix");
    EXPECT_EQ(other.code(), StatusCode::kNotFound);
    EXPECT_EQ(Without(other.ToString(), "doc"), Without(none.ToString(), "nix"));
  };
  ControlClient& control = bob_.control();
  same([&](const std::string& n) { return control.Call<wire::Grant>(wire::Open{n}).status(); });
  same([&](const std::string& n) {
    return control.Call<wire::Grant>(wire::Fork{n, "x"}).status();
  });
  same([&](const std::string& n) { return control.Do(wire::Drop{n}); });
  same([&](const std::string& n) {
    return control.Call<wire::ContextList>(wire::Describe{n}).status();
  });
  EXPECT_EQ(Without(InspectAs(bob_, wire::InspectTopic::kExplain, "doc"), "doc"),
            Without(InspectAs(bob_, wire::InspectTopic::kExplain, "nix"), "nix"));
  EXPECT_EQ(Without(InspectAs(bob_, wire::InspectTopic::kVerify, "doc"), "doc"),
            Without(InspectAs(bob_, wire::InspectTopic::kVerify, "nix"), "nix"));
  // The name is free for him, and alice's context stays what it was.
  const auto own =
      control.Call<wire::Grant>(wire::Create{.name = "doc", .shape = kShape, .policy = "exact"});
  EXPECT_TRUE(own.ok()) << own.status().ToString();
  EXPECT_TRUE(alice_.control().Call<wire::Grant>(wire::Open{"doc"}).ok());
}

TEST_F(Isolation, DataRequestsForOthersContextsAreRefused) {
  EXPECT_TRUE(SelectAs(bob_.grant()).ok());
  EXPECT_EQ(SelectAs(alices()).code(), StatusCode::kPermissionDenied);
  wire::Grant mixed = bob_.grant();  // his context under her epoch, and the reverse
  mixed.epoch = alices().epoch;
  EXPECT_EQ(SelectAs(mixed).code(), StatusCode::kFailedPrecondition);
  mixed = alices();
  mixed.epoch = bob_.grant().epoch;
  EXPECT_EQ(SelectAs(mixed).code(), StatusCode::kPermissionDenied);
  for (uint64_t id = 0; id < 50; ++id) {
    mixed.context.id = ContextId(id);
    if (mixed.context.id == bob_.grant().context.id) continue;
    EXPECT_EQ(SelectAs(mixed).code(), StatusCode::kPermissionDenied) << id;
  }
}

TEST_F(Isolation, TicketsAreBoundToTheirTenantAndCannotBeGuessed) {
  // Stolen: a connection that is bob's does not become alice's.
  EXPECT_EQ(bob_.shard(0).Attach(alices().ticket).code(), StatusCode::kPermissionDenied);
  std::vector<std::byte> guess = alices().ticket;
  guess[5] ^= std::byte{1};
  EXPECT_EQ(bob_.shard(0).Attach(guess).code(), StatusCode::kUnauthenticated);
  EXPECT_EQ(bob_.shard(0).Attach(std::vector<std::byte>(guess.size())).code(),
            StatusCode::kUnauthenticated);
  guess.resize(guess.size() - 1);
  EXPECT_EQ(bob_.shard(0).Attach(guess).code(), StatusCode::kUnauthenticated);
  // Late: a ticket whose lease has ended opens nothing, whoever shows it.
  const auto lease = alice_.control().Call<wire::Grant>(wire::Open{"doc"});
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(alice_.control().Do(wire::Release{lease->context.id}).ok());
  EXPECT_EQ(alice_.shard(0).Attach(lease->ticket).code(), StatusCode::kUnauthenticated);
}

TEST_F(Isolation, ExtentsOfOthersAreNotLent) {
  for (size_t shard = 0; shard < kShards; ++shard) {
    const auto lent = [&](Worker& worker, std::vector<uint64_t> serials) {
      OutMessage message;
      wire::Encode(wire::AttachRequest{.ticket = worker.grant().ticket}, &message);
      const Result<OwnedMessage> reply = worker.shard(shard).Call(std::move(message));
      KV_CHECK(reply.ok());
      const Result<OwnedFd> socket =
          ConnectExtents(wire::DecodeAttachReply(reply->view())->extents);
      KV_CHECK(socket.ok());
      EXPECT_TRUE(
          SendExtentRequest(socket->get(), {worker.grant().ticket, std::move(serials)}).ok());
      const auto extents = ReceiveExtents(socket->get(), std::chrono::seconds(5));
      std::set<uint64_t> found;
      if (extents.ok())
        for (const LentExtent& extent : *extents) found.insert(extent.serial);
      return found;
    };
    const std::set<uint64_t> hers = lent(alice_, {}), his = lent(bob_, {});
    ASSERT_FALSE(hers.empty());
    ASSERT_FALSE(his.empty());
    for (const uint64_t serial : hers) EXPECT_FALSE(his.contains(serial));
    EXPECT_TRUE(lent(bob_, {hers.begin(), hers.end()}).empty());
  }
}

TEST_F(Isolation, KeysForReadingOverTheNetworkEndAtTheTenant) {
  for (size_t shard = 0; shard < kShards; ++shard) {
    const auto keys_of = [&](Worker& worker, const wire::Grant& grant) {
      wire::ExtentKeysRequest request{grant.context.id, grant.epoch, {}};
      for (uint64_t serial = 1; serial <= limits::kExtentsPerReplyMax; ++serial) {
        request.serials.push_back(serial);
      }
      OutMessage message;
      wire::Encode(request, &message);
      const Result<OwnedMessage> reply = worker.shard(shard).Call(std::move(message));
      return reply.ok() ? wire::DecodeExtentKeysReply(reply->view())
                        : Result<wire::ExtentKeysReply>(reply.status());
    };
    const auto hers = keys_of(alice_, alice_.grant()), his = keys_of(bob_, bob_.grant());
    ASSERT_TRUE(his.ok()) << his.status().ToString();
    ASSERT_FALSE(his->serials.empty());
    ASSERT_TRUE(hers.ok()) << hers.status().ToString();
    ASSERT_FALSE(hers->serials.empty());
    for (size_t i = 0; i < hers->serials.size(); ++i) {
      EXPECT_EQ(std::count(his->serials.begin(), his->serials.end(), hers->serials[i]), 0);
      EXPECT_EQ(std::count(his->keys.begin(), his->keys.end(), hers->keys[i]), 0);
    }
    // In the name of her context he gets nothing.
    EXPECT_EQ(keys_of(bob_, alice_.grant()).status().code(), StatusCode::kPermissionDenied);
  }
}

TEST_F(Isolation, ReportsShowATenantItsOwnAndAnAdminEverything) {
  Worker root(server_.address(), 3, "root", "root");
  for (const auto topic : {wire::InspectTopic::kContexts, wire::InspectTopic::kTenants,
                           wire::InspectTopic::kLeases, wire::InspectTopic::kMemory}) {
    SCOPED_TRACE(static_cast<int>(topic));
    EXPECT_THAT(InspectAs(bob_, topic), HasSubstr("bob"));
    EXPECT_THAT(InspectAs(bob_, topic), Not(HasSubstr("alice")));
    EXPECT_THAT(InspectAs(bob_, topic), Not(HasSubstr("\"doc\"")));
    EXPECT_THAT(InspectAs(root, topic), HasSubstr("alice"));
  }
  EXPECT_THAT(InspectAs(bob_, wire::InspectTopic::kVerify), HasSubstr("\"contexts\":1"));
  EXPECT_THAT(InspectAs(root, wire::InspectTopic::kVerify), HasSubstr("\"contexts\":2"));
  EXPECT_EQ(bob_.control().Do(wire::Drain{}).code(), StatusCode::kPermissionDenied);
}

// Frames of a worker's device (docs/gpu.md, "Pages of other workers"): their names are what opens
// them, so they are told to nobody but the tenant's own workers, and only while they are shared.
TEST_F(Isolation, FramesAreNamedToTheirTenantAlone) {
  const auto share = [](ControlClient& control, int n) {
    const std::vector<std::byte> name(30, static_cast<std::byte>(n));
    std::set<int> told;
    const auto list = control.Call<wire::SharedFramesList>(wire::ShareFrames{"host", name, name});
    EXPECT_TRUE(list.ok()) << list.status().ToString();
    for (const auto& frames : list->others) told.insert(static_cast<int>(frames.memory[0]));
    return told;
  };
  Worker root(server_.address(), 3, "root", "root");
  {
    ControlClient other(server_.address());
    ASSERT_TRUE(other.Hello("alice", "alice").ok());
    EXPECT_EQ(share(alice_.control(), 1), std::set<int>{});
    EXPECT_EQ(share(other, 2), std::set<int>{1});
    EXPECT_EQ(share(bob_.control(), 3), std::set<int>{});
    EXPECT_EQ(share(root.control(), 4), std::set<int>{});
    EXPECT_EQ(share(alice_.control(), 1), std::set<int>{2});
  }
  // With its connection.
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!share(alice_.control(), 1).empty() && std::chrono::steady_clock::now() < limit) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(share(alice_.control(), 1), std::set<int>{});
}

TEST_F(Isolation, ListNamesAndCountsAreOnesOwn) {
  const auto list = bob_.control().Call<wire::ContextList>(wire::List{});
  ASSERT_TRUE(list.ok());
  ASSERT_EQ(list->contexts.size(), 1u);
  EXPECT_EQ(list->contexts[0].name, "own");
  EXPECT_EQ(list->contexts[0].tenant, "bob");
}

}  // namespace
}  // namespace icecache
