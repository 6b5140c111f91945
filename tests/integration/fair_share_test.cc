// Two tenants of a real server that both want all of one shard: each gets its share by weight, and
// a light one does not wait behind the other's queue. Counts, never times.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>

#include "cacheserver/context/tenant.h"
#include "cacheserver/test_worker.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"

namespace icecache::test {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kTokens = 6000;
constexpr uint16_t kLayer = 0, kHead = 0;  // one slice, so one shard

// A worker of a tenant that keeps so many Selects on their way.
class Flood {
 public:
  Flood(const std::string& address, const std::string& tenant, uint64_t seed)
      : worker_(address, seed, tenant, tenant) {
    EXPECT_TRUE(worker_.Create("doc", "exact").ok());
    for (uint32_t first = 0; first < kTokens; first += 500) {
      EXPECT_TRUE(worker_.PutRows(kLayer, kHead, first, 500).ok());
    }
    EXPECT_TRUE(worker_.Build(kLayer, kHead, kTokens).ok());
    queries_ = worker_.rows(kLayer, kHead).Queries(seed, kShape.group(), kTokens);
  }
  ~Flood() { going_ = false; }
  void Start(size_t outstanding) {
    for (size_t i = 0; i < outstanding; ++i) Ask([this] { Start(1); });
  }
  void Stop() { going_ = false; }
  void Ask(std::function<void()> then) {
    wire::SelectRequest request;
    request.context = worker_.grant().context.id;
    request.epoch = worker_.grant().epoch;
    request.layer = LayerId(kLayer);
    request.heads = {{.head = KvHeadId(kHead)}};
    request.max_pages = 1;
    request.read_cap = 1u << 16;
    OutMessage out;
    wire::Encode(request, &out);
    out.body.push_back(std::as_bytes(std::span(queries_)));
    worker_.shard_of(kLayer, kHead)
        .channel()
        .Call(std::move(out), std::chrono::seconds(100),
              [this, then = std::move(then)](const Result<InMessage>& reply) {
                if (!going_) return;
                EXPECT_TRUE(reply.ok()) << reply.status().ToString();
                ++answered_;
                then();
              });
  }
  void Turn() { worker_.reactor().Poll(); }
  size_t answered() const { return answered_; }
  Worker& worker() { return worker_; }

 private:
  Worker worker_;
  std::vector<float> queries_;
  bool going_ = true;
  size_t answered_ = 0;
};

class FairShare : public ::testing::Test {
 protected:
  static std::string TokenFile(const TempDir& dir) {
    WriteFile(dir.path("tenants.toml"), TenantEntry("heavy", "heavy", "weight = 3\n") +
                                            TenantEntry("light", "light", "weight = 1\n"));
    return dir.path("tenants.toml");
  }
  void TurnUntil(const std::function<bool()>& done) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(100);
    while (!done()) {
      heavy_.Turn();
      light_.Turn();
      ASSERT_LT(std::chrono::steady_clock::now(), limit) << "no progress";
    }
  }

  TempDir dir_;
  TestServer server_{{"--memory-size", "128MiB", "--threads", std::to_string(kShards), "--lease-ms",
                      "120000", "--token-file", TokenFile(dir_)}};
  Flood heavy_{server_.address(), "heavy", 1};
  Flood light_{server_.address(), "light", 2};
};

TEST_F(FairShare, BusyTenantsAreServedByWeight) {
  heavy_.Start(128);
  light_.Start(128);
  TurnUntil([&] { return std::min(heavy_.answered(), light_.answered()) >= 50; });
  const size_t heavy = heavy_.answered(), light = light_.answered();
  TurnUntil([&] { return heavy_.answered() + light_.answered() >= heavy + light + 2000; });
  const double ratio = static_cast<double>(heavy_.answered() - heavy) /
                       static_cast<double>(light_.answered() - light);
  EXPECT_GT(ratio, 1.8) << "weights are 3 : 1";
  EXPECT_LT(ratio, 5.0) << "weights are 3 : 1";
  heavy_.Stop();
  light_.Stop();

  const std::string metrics = server_.HttpGet("/metrics");
  for (const char* name :
       {"icecache_tenant_service_seconds_total", "icecache_tenant_requests_queued",
        "icecache_tenant_requests_refused_total", "icecache_tenant_requests_expired_total"}) {
    EXPECT_THAT(metrics, HasSubstr(std::string(name) + "{tenant=\"heavy\"}"));
  }
  Process ctl("icecachectl",
              {"tenants", "--json", "--server", server_.address(), "--tenant", "heavy"},
              {"ICECACHE_SECRET=heavy"});
  ASSERT_EQ(ctl.Wait(std::chrono::seconds(60)).exit_code, 0) << ctl.Err();
  const nlohmann::json tenant = nlohmann::json::parse(ctl.Out()).at("tenants").at(0);
  EXPECT_EQ(tenant.at("weight"), 3);
  EXPECT_GT(tenant.at("service_seconds").get<double>(), 0);
}

TEST_F(FairShare, ALightTenantDoesNotWaitBehindAFloodsQueue) {
  constexpr size_t kFlood = 512;
  heavy_.Start(kFlood);
  TurnUntil([&] { return heavy_.answered() >= kFlood; });
  // How many of the flood's requests are answered between a question and its answer. In one queue
  // it would be all that wait: about kFlood.
  std::vector<size_t> passed;
  for (int i = 0; i < 15; ++i) {
    const size_t before = heavy_.answered();
    bool answered = false;
    light_.Ask([&] { answered = true; });
    TurnUntil([&] { return answered; });
    passed.push_back(heavy_.answered() - before);
  }
  std::sort(passed.begin(), passed.end());
  EXPECT_LT(passed[passed.size() / 2], kFlood / 4);
  heavy_.Stop();
}

}  // namespace
}  // namespace icecache::test
