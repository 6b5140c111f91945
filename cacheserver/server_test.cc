// The whole server in one process over real sockets and UCX, used as a worker uses it. Truth:
// attention in float64 over the rows that were sent.
#include "cacheserver/server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "cacheserver/test_worker.h"
#include "kernels/packing.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

double StatusNumber(const RunningServer& server, const char* pointer) {
  const auto status = nlohmann::json::parse(server.Page("/status"));
  return status.at(nlohmann::json::json_pointer(pointer)).get<double>();
}

class ServerPolicyTest : public ::testing::TestWithParam<const char*> {};

// Every token counts once, whatever the budget: pages + residual + window + sinks is full
// attention.
TEST_P(ServerPolicyTest, PrefillAndDecodeGiveFullAttention) {
  RunningServer server;
  Worker worker(server.address(), 1);
  ASSERT_TRUE(worker.Create("doc", GetParam()).ok());
  constexpr uint32_t kTokens = 500;
  ASSERT_TRUE(worker.Prefill(kTokens).ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    uint32_t indexed = kTokens - kWindow;
    for (uint32_t tokens = kTokens; tokens < kTokens + 60; ++tokens) {
      const uint32_t appended = tokens == kTokens ? 0 : 1;
      indexed += appended;
      worker.CheckStep(layer, head, tokens, indexed, appended, tokens % 3 == 0 ? 1000 : 6, tokens);
    }
  });
}

// Exact residuals at every budget: these policies read all tokens when they may.
INSTANTIATE_TEST_SUITE_P(Policies, ServerPolicyTest, ::testing::Values("exact", "cluster_tree"));

TEST(Server, ForkContinuesItsParentAndCopiesNothing) {
  RunningServer server;
  Worker writer(server.address(), 7);
  ASSERT_TRUE(writer.Create("doc", "exact").ok());
  constexpr uint32_t kTokens = 300;
  ASSERT_TRUE(writer.Prefill(kTokens).ok());
  const ContextId doc = writer.grant().context.id;
  ASSERT_TRUE(writer.control().Do(wire::Seal{doc}).ok());
  ASSERT_TRUE(writer.control().Do(wire::Publish{doc}).ok());
  const wire::ContextList before = *writer.control().Call<wire::ContextList>(wire::Describe{"doc"});
  ASSERT_EQ(before.contexts.size(), 1u);
  EXPECT_EQ(before.contexts[0].tokens, kTokens);
  EXPECT_EQ(before.contexts[0].tail_tokens, kWindow);
  EXPECT_GE(before.contexts[0].segments[0].bytes, kTokens * kShape.token_bytes());
  writer.control().Close();

  Worker reader(server.address(), 7);
  ASSERT_TRUE(reader.Fork("doc", "question").ok());
  EXPECT_EQ(reader.grant().context.tokens, kTokens);
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    for (const auto part : {wire::RowsPart::kSinks, wire::RowsPart::kTail}) {
      Result<OwnedMessage> message = reader.FetchRows(layer, head, part);
      ASSERT_TRUE(message.ok()) << message.status().ToString();
      Result<wire::FetchRowsReply> rows = wire::DecodeFetchRowsReply(message->view(), kShape, 1);
      ASSERT_TRUE(rows.ok());
      const bool sinks = part == wire::RowsPart::kSinks;
      EXPECT_EQ(rows->first_position, sinks ? 0 : kTokens - kWindow);
      ASSERT_EQ(rows->count, sinks ? kSinks : kWindow);
      const auto k = reader.rows(layer, head).K(rows->first_position, rows->count);
      EXPECT_TRUE(std::equal(k.begin(), k.end(), rows->body.begin()));
      EXPECT_EQ(rows->checksum, Checksum64(rows->body));
    }
    uint32_t indexed = kTokens - kWindow;
    for (uint32_t tokens = kTokens; tokens < kTokens + 40; ++tokens) {
      const uint32_t appended = tokens == kTokens ? 0 : 1;
      indexed += appended;
      reader.CheckStep(layer, head, tokens, indexed, appended, 5, tokens);
    }
  });
  const wire::ContextList after = *reader.control().Call<wire::ContextList>(wire::List{});
  ASSERT_EQ(after.contexts.size(), 2u);
  EXPECT_EQ(after.contexts[0].segments[0].bytes, before.contexts[0].segments[0].bytes);
  EXPECT_EQ(after.contexts[1].segments[0].references, 2u);
}

TEST(Server, ResidentPagesAreNotSentAgain) {
  RunningServer server;
  Worker worker(server.address(), 3);
  ASSERT_TRUE(worker.Create("doc", "exact").ok());
  ASSERT_TRUE(worker.Prefill(300).ok());
  const std::vector<float> queries = worker.rows(0, 0).Queries(5, kShape.group(), 300);
  auto first = worker.Select(0, 0, queries, 8, 0, 0);
  ASSERT_TRUE(first.ok()) << first.status().ToString();
  std::vector<wire::ResidentPage> resident;
  for (const wire::PagePayload& page : first->reply.heads[0].pages) {
    resident.push_back({page.segment, page.page, page.version, page.fill});
  }
  ASSERT_EQ(resident.size(), 8u);
  auto again = worker.Select(0, 0, queries, 8, 0, 0, resident);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(again->message.body.empty());
  EXPECT_EQ(again->reply.heads[0].pages.size(), 8u);
}

TEST(Server, RequestsAreFencedByTicketEpochLeaseAndRight) {
  RunningServer server;
  Worker writer(server.address(), 9);
  ASSERT_TRUE(writer.Create("doc", "exact").ok());
  ASSERT_TRUE(writer.Prefill(100).ok());
  const wire::Grant grant = writer.grant();

  Worker stranger(server.address(), 9);
  EXPECT_EQ(stranger.shard(0).Attach(std::vector<std::byte>(32)).code(),
            StatusCode::kUnauthenticated);
  stranger.set_grant(grant);  // knows id and epoch, has no ticket
  EXPECT_EQ(stranger.PutRows(0, 0, 0, 10).code(), StatusCode::kPermissionDenied);

  wire::Grant stale = grant;
  --stale.epoch.value;
  writer.set_grant(stale);
  EXPECT_EQ(writer.FetchRows(0, 0, wire::RowsPart::kSinks).status().code(),
            StatusCode::kFailedPrecondition);
  writer.set_grant(grant);
  EXPECT_TRUE(writer.FetchRows(0, 0, wire::RowsPart::kSinks).ok());
  // A slice of the other shard is refused, and a shape that does not fit.
  OutMessage out;
  wire::Encode(wire::FetchRowsRequest{.slices = writer.Slices(0, 1)}, &out);
  EXPECT_EQ(writer.shard_of(0, 0).Call(std::move(out)).status().code(),
            StatusCode::kInvalidArgument);

  ASSERT_TRUE(writer.control().Do(wire::Seal{grant.context.id}).ok());
  ASSERT_TRUE(writer.control().Do(wire::Publish{grant.context.id}).ok());
  ASSERT_TRUE(stranger.Attach(*stranger.control().Call<wire::Grant>(wire::Open{"doc"})).ok());
  EXPECT_TRUE(stranger.FetchRows(0, 0, wire::RowsPart::kTail).ok());
  const std::vector<float> queries = writer.rows(0, 0).Queries(1, kShape.group(), 100);
  EXPECT_TRUE(stranger.Select(0, 0, queries, 4, 0, 0).ok());
  EXPECT_EQ(stranger.Select(0, 0, queries, 4, 68, 1).status().code(),
            StatusCode::kPermissionDenied);
  EXPECT_EQ(stranger.PutRows(0, 0, 68, 1).code(), StatusCode::kPermissionDenied);

  // The lease ends: the same connection, ticket and epoch are worth nothing.
  ASSERT_TRUE(stranger.control().Do(wire::Release{grant.context.id}).ok());
  EXPECT_EQ(stranger.Select(0, 0, queries, 4, 0, 0).status().code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(stranger.shard(0).Attach(stranger.grant().ticket).code(), StatusCode::kUnauthenticated);
}

TEST(Server, SealNeedsTheRowsOfAllLayers) {
  RunningServer server;
  Worker worker(server.address(), 11);
  ASSERT_TRUE(worker.Create("doc", "exact").ok());
  const ContextId doc = worker.grant().context.id;
  ASSERT_TRUE(worker.PutRows(0, 0, 0, 20).ok());
  Status status = worker.control().Do(wire::Seal{doc});
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("missing rows"));
  ForEachSlice(
      [&](uint16_t layer, uint16_t head) { ASSERT_TRUE(worker.PutRows(layer, head, 0, 20).ok()); });
  EXPECT_TRUE(worker.control().Do(wire::Seal{doc}).ok());
  EXPECT_EQ(worker.PutRows(0, 0, 20, 1).code(), StatusCode::kFailedPrecondition);
}

TEST(Server, WhatAWorkerHeldIsFreeWhenItIsGone) {
  RunningServer server;
  auto worker = std::make_unique<Worker>(server.address(), 29);
  ASSERT_TRUE(worker->Create("doc", "cluster_tree").ok());
  ASSERT_TRUE(worker->Prefill(300).ok());
  EXPECT_GE(StatusNumber(server, "/memory/used_bytes"),
            300.0 * static_cast<double>(kShape.token_bytes()));
  EXPECT_EQ(StatusNumber(server, "/leases"), 1);
  EXPECT_THAT(server.Page("/metrics"),
              HasSubstr("icecache_requests_total{kind=\"put_rows\",result=\"OK\"}"));
  worker.reset();
  // Its connection's end is noticed on the server's thread: asked for until it is, within bounds.
  for (int i = 0; i < 1000; ++i) {
    if (StatusNumber(server, "/leases") + StatusNumber(server, "/memory/held_bytes") == 0) break;
  }
  EXPECT_EQ(StatusNumber(server, "/leases"), 0);
  EXPECT_EQ(StatusNumber(server, "/memory/used_bytes"), 0);
  EXPECT_EQ(StatusNumber(server, "/memory/held_bytes"), 0);
}

TEST(Server, QuotaHoldsForItsTenantAlone) {
  RunningServer server(
      *TenantTable::Parse(test::TenantEntry("small", "small", "quota = \"256KiB\"\n") +
                              test::TenantEntry("large", "large"),
                          "test"));
  Worker small(server.address(), 31, "small", "small"),
      large(server.address(), 31, "large", "large");
  ASSERT_TRUE(small.Create("doc", "exact").ok());
  ASSERT_TRUE(large.Create("doc", "exact").ok());
  Status status;
  for (uint32_t first = 0; first < 4096 && status.ok(); first += 256)
    status = small.PutRows(0, 0, first, 256);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted) << status.ToString();
  EXPECT_TRUE(small.PutRows(0, 1, 0, 16).ok());  // the other shard has its own part of the quota
  EXPECT_TRUE(large.Prefill(1024).ok());
  // Neither knows the other's context, by name or by ticket on its own connection.
  EXPECT_EQ(small.control().Call<wire::Grant>(wire::Open{"nothing"}).status().code(),
            StatusCode::kNotFound);
  EXPECT_EQ(small.shard(0).Attach(large.grant().ticket).code(), StatusCode::kPermissionDenied);
}

TEST(Server, DropWhileABuildRunsIsClean) {
  RunningServer server;
  for (int i = 0; i < 5; ++i) {
    std::optional<Status> status;  // outlives the worker, whose end answers the call
    Worker worker(server.address(), 13);
    ASSERT_TRUE(worker.Create("doc", "cluster_tree").ok());
    for (uint32_t first = 0; first < 2048; first += 512)
      ASSERT_TRUE(worker.PutRows(0, 0, first, 512).ok());
    OutMessage out;
    wire::Encode(wire::BuildRequest{.slices = worker.Slices(0, 0), .token_count = 2048}, &out);
    worker.shard_of(0, 0).channel().Call(
        std::move(out), std::chrono::seconds(10),
        [&](Result<InMessage> reply) { status = reply.ok() ? OkStatus() : reply.status(); });
    ASSERT_TRUE(worker.control().Do(wire::Drop{"doc"}).ok());
    ASSERT_TRUE(worker.Create("doc", "cluster_tree").ok());
    ASSERT_TRUE(worker.control().Do(wire::Drop{"doc"}).ok());
  }
}

// What a worker proposes is checked before it is believed; then the right one is taken.
TEST(Server, AProposedLayoutThatIsNoneIsRefusedAndNothingElseHappens) {
  RunningServer server;
  Worker worker(server.address(), 14);
  ASSERT_TRUE(worker.Create("doc", "cluster_tree").ok());
  constexpr uint32_t kTokens = 512, kIndexed = kTokens - kSinks - kWindow;
  ASSERT_TRUE(worker.PutRows(0, 0, 0, kTokens).ok());
  Packing sound = packing::PackSequential(kIndexed);
  const auto build = [&](const Packing& layout) {
    OutMessage out;
    wire::Encode(
        wire::BuildRequest{
            .slices = worker.Slices(0, 0), .token_count = kTokens, .layouts = {layout}},
        &out);
    return worker.shard_of(0, 0).Call(std::move(out)).status();
  };
  Packing twice = sound, many = sound, loose = sound;
  twice.layout.tokens[5] = 6;
  many.layout = packing::PackSequential(kTokens).layout;
  loose.super_begin = {0, 65};
  for (const Packing& broken : {twice, many, loose}) {
    const Status refused = build(broken);
    EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument) << refused.ToString();
    EXPECT_NE(refused.message().find("layer 0 kv head 0"), std::string::npos) << refused.message();
  }
  EXPECT_TRUE(build(sound).ok());
}

TEST(Server, TwoWorkersAtOnce) {
  RunningServer server;
  Worker writer(server.address(), 17);
  ASSERT_TRUE(writer.Create("doc", "cluster_tree").ok());
  ASSERT_TRUE(writer.Prefill(400).ok());
  ASSERT_TRUE(writer.control().Do(wire::Seal{writer.grant().context.id}).ok());
  ASSERT_TRUE(writer.control().Do(wire::Publish{writer.grant().context.id}).ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&server, t] {
      Worker reader(server.address(), 17);
      ASSERT_TRUE(reader.Fork("doc", "q" + std::to_string(t)).ok());
      for (uint32_t i = 0; i < 40; ++i) {
        ForEachSlice([&](uint16_t layer, uint16_t head) {
          reader.CheckStep(layer, head, 400 + i, 400 - kWindow + i, i > 0 ? 1 : 0, 4, i);
        });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Server, DrainWaitsForLeasesAndThenEnds) {
  RunningServer server;
  auto worker = std::make_unique<Worker>(server.address(), 19);
  ASSERT_TRUE(worker->Create("doc", "exact").ok());
  std::thread drainer([&] { server.DrainAndJoin(); });
  // New work is refused as soon as the drain has begun; old work goes on.
  Status refused;
  while (refused.ok()) {
    auto grant = worker->control().Call<wire::Grant>(
        wire::Create{.name = "", .shape = kShape, .policy = "exact"});
    if (grant.ok()) {
      ASSERT_TRUE(worker->control().Do(wire::Release{grant->context.id}).ok());
    } else {
      refused = grant.status();
    }
  }
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable);
  EXPECT_TRUE(worker->PutRows(0, 0, 0, 10).ok());
  worker.reset();
  drainer.join();
}

TEST(Server, GarbageOnTheDataPlaneIsAnsweredWithErrors) {
  RunningServer server;
  Worker worker(server.address(), 23);
  ASSERT_TRUE(worker.Create("doc", "exact").ok());
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int i = 0; i < 200; ++i) {
    OutMessage out;
    out.kind = static_cast<uint16_t>(1 + random() % 9);
    if (random() % 2 == 0) {
      wire::Encode(wire::FetchRowsRequest{.slices = worker.Slices(0, 0)}, &out);
      for (uint32_t n = random() % 6; n > 0; --n)
        out.meta[random() % out.meta.size()] ^= static_cast<std::byte>(random());
    } else {
      out.meta.resize(random() % 128);
      for (std::byte& b : out.meta) b = static_cast<std::byte>(random());
    }
    auto body = std::make_shared<std::vector<std::byte>>(random() % 200);
    for (std::byte& b : *body) b = static_cast<std::byte>(random());
    if (random() % 2 == 0) {
      out.body.push_back(*body);
      out.pin = body;
    }
    Result<OwnedMessage> reply = worker.shard(0).Call(std::move(out));
    if (reply.ok()) continue;
    ASSERT_NE(reply.status().code(), StatusCode::kUnavailable) << reply.status().ToString();
  }
  EXPECT_TRUE(worker.PutRows(0, 0, 0, 10).ok());
}

}  // namespace
}  // namespace icecache
