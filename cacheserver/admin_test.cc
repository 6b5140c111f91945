#include "cacheserver/admin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <nlohmann/json.hpp>
#include <random>

#include "cacheserver/server_report.h"
#include "common/address.h"
#include "common/limits.h"

namespace icecache {
namespace {

using boost::asio::ip::tcp;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// The pages on the test's own thread; a page that must ask others is answered when the test says
// so.
class AdminTest : public ::testing::Test {
 protected:
  void Start(bool with_token = false) {
    AdminPages pages;
    pages.ready = [this] { return ready_; };
    pages.metrics = [this](AdminPages::Answer answer) { answer(metrics_.RenderPrometheus()); };
    pages.status = [this](AdminPages::Answer answer) { waiting_.push_back(std::move(answer)); };
    pages.version = "{\"version\": \"1\"}\n";
    pages.config = "port = 7400\n";
    if (with_token)
      pages.authorize = [](std::string_view bearer) { return bearer == "root:secret"; };
    admin_ = std::make_unique<Admin>(reactor_, metrics_, std::move(pages));
    port_ = ParseHostPort(*admin_->Listen("127.0.0.1", 0))->port;
  }
  std::unique_ptr<tcp::socket> Connect() {
    auto socket = std::make_unique<tcp::socket>(client_);
    socket->connect({boost::asio::ip::address_v4::loopback(), port_});
    socket->non_blocking(true);
    return socket;
  }
  void Write(tcp::socket& socket, const std::string& text) {
    boost::system::error_code ignored;
    socket.write_some(boost::asio::buffer(text), ignored);
  }
  // What has come until the server closes, or until `enough` is in it.
  std::string Read(tcp::socket& socket, const std::string& enough = "") {
    std::string text;
    std::array<char, 4096> buffer;
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (std::chrono::steady_clock::now() < limit) {
      reactor_.Poll();
      for (AdminPages::Answer& answer : std::exchange(waiting_, {})) answer("{\"late\": true}\n");
      boost::system::error_code error;
      const size_t n = socket.read_some(boost::asio::buffer(buffer), error);
      text.append(buffer.data(), n);
      if (error && error != boost::asio::error::would_block) return text;
      if (!enough.empty() && text.find(enough) != std::string::npos) return text;
    }
    ADD_FAILURE() << "no end in 10 s: " << text;
    return text;
  }
  std::string Get(const std::string& target, const std::string& headers = "") {
    auto socket = Connect();
    Write(*socket,
          "GET " + target + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + "\r\n");
    return Read(*socket);
  }

  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration::zero()};
  MetricsRegistry metrics_;
  boost::asio::io_context client_;
  std::unique_ptr<Admin> admin_;
  std::vector<AdminPages::Answer> waiting_;
  bool ready_ = true;
  uint16_t port_ = 0;
};

TEST_F(AdminTest, PagesAnswer) {
  Start();
  metrics_.GetCounter("icecache_things_total", "Things.").Add(3);
  EXPECT_THAT(Get("/metrics"), HasSubstr("icecache_things_total 3"));
  EXPECT_THAT(Get("/live"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(Get("/version"), HasSubstr("{\"version\": \"1\"}"));
  EXPECT_THAT(Get("/config"), HasSubstr("port = 7400"));
  EXPECT_THAT(Get("/status?pretty"), HasSubstr("{\"late\": true}"));
  EXPECT_THAT(Get("/nothing"), StartsWith("HTTP/1.1 404"));
}

TEST_F(AdminTest, ReadyFollowsTheDrainAndLiveDoesNot) {
  Start();
  EXPECT_THAT(Get("/ready"), StartsWith("HTTP/1.1 200"));
  ready_ = false;
  EXPECT_THAT(Get("/ready"), StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(Get("/live"), StartsWith("HTTP/1.1 200"));
}

TEST_F(AdminTest, TokenIsAskedForExceptForProbes) {
  Start(true);
  EXPECT_THAT(Get("/live"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(Get("/ready"), StartsWith("HTTP/1.1 200"));
  for (const char* page : {"/metrics", "/status", "/config", "/version"}) {
    EXPECT_THAT(Get(page), StartsWith("HTTP/1.1 401")) << page;
    EXPECT_THAT(Get(page, "Authorization: Bearer root:wrong\r\n"), StartsWith("HTTP/1.1 401"));
    EXPECT_THAT(Get(page, "Authorization: Bearer root:secret\r\n"), StartsWith("HTTP/1.1 200"));
  }
}

TEST_F(AdminTest, OneConnectionServesManyRequests) {
  Start();
  auto socket = Connect();
  for (int i = 0; i < 3; ++i) {
    Write(*socket, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_THAT(Read(*socket, "live\n"), StartsWith("HTTP/1.1 200"));
  }
  Write(*socket, "HEAD /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const std::string head = Read(*socket);
  EXPECT_THAT(head, HasSubstr("Content-Length: 5"));
  EXPECT_THAT(head, Not(HasSubstr("live\n")));
}

TEST_F(AdminTest, OnlyGetIsServed) {
  Start();
  auto socket = Connect();
  Write(*socket, "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
  EXPECT_THAT(Read(*socket), StartsWith("HTTP/1.1 405"));
}

TEST_F(AdminTest, TooLongAndBrokenRequestsEnd) {
  Start();
  auto socket = Connect();
  Write(*socket, "GET / HTTP/1.1\r\nX: " + std::string(limits::kHttpRequestBytesMax + 100, 'a'));
  (void)Read(*socket);  // ends
  EXPECT_THAT(Get("/live"), StartsWith("HTTP/1.1 200"));
}

TEST_F(AdminTest, RandomBytesDoNoHarm) {
  Start();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const std::string good = "GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  for (int i = 0; i < 300; ++i) {
    std::string text = good;
    for (uint32_t n = 1 + random() % 6; n > 0; --n)
      text[random() % text.size()] = static_cast<char>(random());
    text.resize(1 + random() % text.size());
    auto socket = Connect();
    Write(*socket, text);
    for (int turn = 0; turn < 5; ++turn) reactor_.Poll();
  }
  EXPECT_THAT(Get("/live"), StartsWith("HTTP/1.1 200"));
}

TEST_F(AdminTest, ConnectionsHaveAMaximum) {
  Start();
  std::vector<std::unique_ptr<tcp::socket>> held;
  for (uint32_t i = 0; i < limits::kHttpConnectionsMax; ++i) {
    held.push_back(Connect());
    Write(*held.back(), "GET /live HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_THAT(Read(*held.back(), "live\n"), StartsWith("HTTP/1.1 200"));
  }
  auto over = Connect();
  EXPECT_EQ(Read(*over), "");  // closed without a word
  held.clear();
  std::string answer;
  for (int i = 0; i < 200 && answer.empty(); ++i) {
    reactor_.Poll();
    answer = Get("/live");
  }
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 200"));
}

TEST(ServerReport, JsonHasTheNumbersThatScriptsRead) {
  const TenantTable tenants = TenantTable::Open();
  ServerReport report;
  report.ready = true;
  report.memory_size = 1 << 30;
  ShardStatus shard;
  shard.pool.extents = 1;
  shard.pool.frame_bytes = 1000;
  shard.pool.row_bytes = 24;
  shard.tenants[TenantId(0)] = {.extents = 1, .frames = 1, .frame_bytes = 1000, .row_bytes = 24};
  report.shards = {shard, shard};
  wire::ContextInfo context;
  context.name = "bad \xff name";
  context.segments.push_back({.id = SegmentId(1), .tokens = 10, .sealed = true, .references = 2});
  report.contexts.contexts.push_back(context);
  const auto json = nlohmann::json::parse(StatusJson(report, tenants));
  EXPECT_EQ(json["memory"]["used_bytes"], 2048);
  EXPECT_EQ(json["memory"]["held_bytes"], 2 * (limits::kExtentBytes + 24));
  EXPECT_EQ(json["tenants"][0]["name"], "default");
  EXPECT_EQ(json["tenants"][0]["used_bytes"], 2048);
  EXPECT_EQ(json["contexts"][0]["segments"][0]["references"], 2);
  EXPECT_EQ(json["shards"].size(), 2u);

  MetricsRegistry metrics;
  SetMemoryGauges(report.shards, tenants, report.memory_size, metrics);
  EXPECT_THAT(metrics.RenderPrometheus(),
              HasSubstr("icecache_tenant_held_bytes{tenant=\"default\"} 16777264"));
}

}  // namespace
}  // namespace icecache
