// The whole server in one process over real sockets and UCX, used as a worker uses it. Truth:
// attention in float64 over the rows that were sent.
#include "cacheserver/server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "cacheserver/context/test_rows.h"
#include "cacheserver/test_client.h"
#include "common/checksum.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32, .dtype = DType::kF32};
constexpr uint32_t kSinks = 4, kWindow = 32, kShards = 2;

class RunningServer {
 public:
  explicit RunningServer(uint32_t lease_ms = 10000) {
    ApplyUcxEnvironment();
    ServerParts parts;
    parts.config = DefaultServerConfig(ReadMachine());
    parts.config.port = parts.config.http_port = 0;
    parts.config.memory_size = 256u << 20;
    parts.config.threads = kShards;
    parts.config.build_threads = 2;
    parts.config.lease_ms = lease_ms;
    parts.config.drain_timeout_ms = 3000;
    parts.make_transport = [](Reactor& reactor) { return MakeUcxTransport(reactor, {}); };
    Result<std::unique_ptr<Server>> started = Server::Start(std::move(parts));
    KV_CHECK(started.ok());
    server_ = std::move(started).value();
    address_ = server_->control_address();
    thread_ = std::thread([this] {
      EXPECT_TRUE(server_->Run().ok());
      server_.reset();
    });
  }
  ~RunningServer() {
    if (thread_.joinable()) {
      server_->Stop();
      thread_.join();
    }
  }
  void DrainAndJoin() {
    server_->Drain();
    thread_.join();
  }
  Server& server() { return *server_; }
  const std::string& address() const { return address_; }

 private:
  std::unique_ptr<Server> server_;  // destroyed on its thread
  std::string address_;
  std::thread thread_;
};

// A worker: control connection, one data connection per shard, and its rows.
class Worker {
 public:
  Worker(const std::string& address, uint64_t seed) : control_(address) {
    const Result<wire::HelloReply> hello = control_.Hello();
    KV_CHECK(hello.ok());
    transport_ = std::move(MakeUcxTransport(reactor_, {})).value();
    for (const std::string& shard : hello->shards) {
      data_.push_back(std::make_unique<DataClient>(reactor_, *transport_, shard));
    }
    for (uint32_t i = 0; i < kShape.layers * kShape.kv_heads; ++i)
      rows_.emplace_back(seed + i * 1000003, kShape.dtype, kShape.head_dim);
  }
  ControlClient& control() { return control_; }
  TestRows& rows(uint16_t layer, uint16_t head) { return rows_[layer * kShape.kv_heads + head]; }
  DataClient& shard_of(uint16_t layer, uint16_t head) {
    return *data_[ShardOf(LayerId(layer), KvHeadId(head), kShape, kShards).value];
  }
  DataClient& shard(size_t i) { return *data_[i]; }

  Status Attach(const wire::Grant& grant) {
    grant_ = grant;
    for (const auto& data : data_) KV_RETURN_IF_ERROR(data->Attach(grant.ticket));
    return OkStatus();
  }
  Status Create(const std::string& name, const std::string& policy) {
    KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                        control_.Call<wire::Grant>(wire::Create{.name = name,
                                                                .shape = kShape,
                                                                .model = "tiny",
                                                                .sink_tokens = kSinks,
                                                                .window_tokens = kWindow,
                                                                .policy = policy}));
    return Attach(grant);
  }
  Status Fork(const std::string& parent, const std::string& name) {
    KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                        control_.Call<wire::Grant>(wire::Fork{parent, name}));
    return Attach(grant);
  }
  wire::SliceSet Slices(uint16_t layer, uint16_t head) const {
    return {.context = grant_.context.id,
            .epoch = grant_.epoch,
            .layer = LayerId(layer),
            .heads = {KvHeadId(head)}};
  }
  Status PutRows(uint16_t layer, uint16_t head, uint32_t first, uint32_t count) {
    OutMessage out;
    wire::Encode(
        wire::PutRowsRequest{
            .slices = Slices(layer, head), .first_position = first, .token_count = count},
        &out);
    TestRows& rows = this->rows(layer, head);
    out.body = {rows.K(first, count), rows.V(first, count)};
    KV_ASSIGN_OR_RETURN(const OwnedMessage reply, shard_of(layer, head).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(const wire::PutRowsReply done, wire::DecodePutRowsReply(reply.view()));
    EXPECT_EQ(done.next_position, first + count);
    return OkStatus();
  }
  Result<uint32_t> Build(uint16_t layer, uint16_t head, uint32_t tokens) {
    OutMessage out;
    wire::Encode(wire::BuildRequest{.slices = Slices(layer, head), .token_count = tokens}, &out);
    KV_ASSIGN_OR_RETURN(const OwnedMessage reply, shard_of(layer, head).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(const wire::BuildReply built, wire::DecodeBuildReply(reply.view()));
    return built.pages;
  }
  Status Prefill(uint32_t tokens) {
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
        for (uint32_t first = 0; first < tokens; first += 256) {
          KV_RETURN_IF_ERROR(PutRows(layer, head, first, std::min(256u, tokens - first)));
        }
        KV_ASSIGN_OR_RETURN(const uint32_t pages, Build(layer, head, tokens));
        EXPECT_GE(pages, (tokens - kSinks - kWindow + 15) / 16);
      }
    }
    return OkStatus();
  }
  struct Selected {
    OwnedMessage message;
    wire::SelectReply reply;  // spans into message
  };
  Result<Selected> Select(uint16_t layer, uint16_t head, const std::vector<float>& queries,
                          uint32_t max_pages, uint32_t append_first, uint32_t append_count,
                          const std::vector<wire::ResidentPage>& resident = {}) {
    wire::SelectRequest request;
    request.context = grant_.context.id;
    request.epoch = grant_.epoch;
    request.layer = LayerId(layer);
    request.heads = {{.head = KvHeadId(head), .resident = resident}};
    request.max_pages = max_pages;
    request.read_cap = 1u << 16;
    request.append_first = append_first;
    request.append_count = append_count;
    OutMessage out;
    wire::Encode(request, &out);
    out.body.push_back(std::as_bytes(std::span(queries)));
    TestRows& rows = this->rows(layer, head);
    if (append_count > 0) {
      out.body.push_back(rows.K(append_first, append_count));
      out.body.push_back(rows.V(append_first, append_count));
    }
    Selected selected;
    KV_ASSIGN_OR_RETURN(selected.message, shard_of(layer, head).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(selected.reply, wire::DecodeSelectReply(selected.message.view(), kShape));
    return selected;
  }
  Result<OwnedMessage> FetchRows(uint16_t layer, uint16_t head, wire::RowsPart part) {
    OutMessage out;
    wire::Encode(wire::FetchRowsRequest{.slices = Slices(layer, head), .part = part}, &out);
    return shard_of(layer, head).Call(std::move(out));
  }
  // One decode step as a worker does it: sinks, window, the server's pages and residual, against
  // the truth over [0, tokens); `indexed` rows are at the server, the last `appended` of them come
  // with this request.
  void CheckStep(uint16_t layer, uint16_t head, uint32_t tokens, uint32_t indexed,
                 uint32_t appended, uint32_t max_pages, uint64_t seed) {
    SCOPED_TRACE("layer " + std::to_string(layer) + " head " + std::to_string(head) + " tokens " +
                 std::to_string(tokens) + " pages " + std::to_string(max_pages));
    TestRows& rows = this->rows(layer, head);
    const std::vector<float> queries = rows.Queries(seed, kShape.group(), tokens);
    Result<Selected> selected =
        Select(layer, head, queries, max_pages, indexed - appended, appended);
    ASSERT_TRUE(selected.ok()) << selected.status().ToString();
    EXPECT_EQ(selected->reply.next_position, indexed);
    ASSERT_EQ(selected->reply.heads.size(), 1u);
    const wire::HeadSelection& chosen = selected->reply.heads[0];
    EXPECT_LE(chosen.pages.size(), max_pages);

    AttentionStates states(kShape.group(), kShape.head_dim);
    auto reference = MakeReferenceAttention();
    reference->AttendRows(queries.data(), rows.Rows(0, kSinks), states.ref());
    const TokenRows window = rows.Rows(indexed, tokens - indexed);
    reference->AttendRows(queries.data(), window, states.ref());
    for (const wire::PagePayload& page : chosen.pages) {
      ASSERT_EQ(page.from, 0);
      EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version},
                                            page.k_rows, page.v_rows, page.positions));
      reference->AttendRows(
          queries.data(),
          {kShape.dtype, kShape.head_dim, page.fill, page.k_rows.data(), page.v_rows.data()},
          states.ref());
    }
    AttentionStates residual(kShape.group(), kShape.head_dim);
    ASSERT_EQ(chosen.residual.size(), residual.flat().size());
    std::copy(chosen.residual.begin(), chosen.residual.end(), residual.flat().begin());
    MergeStates(residual.ref(), states.ref());
    ExpectAttention(states, rows.FullAttention(queries, kShape.group(), tokens));
  }
  const wire::Grant& grant() const { return grant_; }
  void set_grant(const wire::Grant& grant) { grant_ = grant; }

 private:
  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration::zero()};
  ControlClient control_;
  std::unique_ptr<Transport> transport_;
  std::vector<std::unique_ptr<DataClient>> data_;
  std::vector<TestRows> rows_;
  wire::Grant grant_;
};

template <typename Check>
void ForEachSlice(const Check& check) {
  for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
    for (uint16_t head = 0; head < kShape.kv_heads; ++head) check(layer, head);
  }
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

TEST(Server, DropWhileABuildRunsIsClean) {
  RunningServer server;
  for (int i = 0; i < 5; ++i) {
    Worker worker(server.address(), 13);
    ASSERT_TRUE(worker.Create("doc", "cluster_tree").ok());
    for (uint32_t first = 0; first < 2048; first += 512)
      ASSERT_TRUE(worker.PutRows(0, 0, first, 512).ok());
    OutMessage out;
    wire::Encode(wire::BuildRequest{.slices = worker.Slices(0, 0), .token_count = 2048}, &out);
    std::optional<Status> status;
    worker.shard_of(0, 0).channel().Call(
        std::move(out), std::chrono::seconds(10),
        [&](Result<InMessage> reply) { status = reply.ok() ? OkStatus() : reply.status(); });
    ASSERT_TRUE(worker.control().Do(wire::Drop{"doc"}).ok());
    ASSERT_TRUE(worker.Create("doc", "cluster_tree").ok());
    ASSERT_TRUE(worker.control().Do(wire::Drop{"doc"}).ok());
  }
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
