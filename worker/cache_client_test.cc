#include "worker/cache_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "worker/test_served.h"

namespace icecache {
namespace {

using std::chrono::milliseconds;
using test::ServedDocument;
using test::SmallShape;

// Takes what comes and remembers it; calls pages bad as told.
class RecordingSink final : public SelectionSink {
 public:
  void FillHead(wire::SelectHead*) override {}
  void OnSelection(const wire::HeadSelection& selection,
                   std::vector<wire::ResidentPage>* refetch) override {
    heads.push_back(selection.head);
    for (const wire::PagePayload& page : selection.pages) {
      ++pages;
      if (call_bad > 0) {
        --call_bad;
        refetch->push_back({page.segment, page.page, page.version, page.fill});
      }
    }
  }
  void OnRefetched(KvHeadId, const wire::PagePayload& page) override {
    ++refetched;
    EXPECT_EQ(page.from, 0);
  }
  Status OnReplyTaken() override { return OkStatus(); }
  Status Settle(std::vector<HeadPages>*) override { return OkStatus(); }
  std::vector<KvHeadId> heads;
  int pages = 0, refetched = 0, call_bad = 0;
};

class CacheClientTest : public ::testing::Test {
 protected:
  static LoopbackFaults Delayed() {
    LoopbackFaults faults;
    faults.delay_min = std::chrono::microseconds(50);
    faults.delay_max = std::chrono::microseconds(300);
    return faults;
  }
  CacheClientTest()
      : served_(SmallShape(2, 4), 4, 8, 200, 0, 3, 11, Delayed()), queries_(8 * 16, 0.25f) {}

  Result<SelectOutcome> Select(const std::function<void()>& meanwhile = {}) {
    SelectParams params;
    params.layer = LayerId(1);
    params.queries = queries_.data();
    params.max_pages = 3;
    params.append_first = TokenPos(192);
    params.deadline = milliseconds(500);
    return served_.client->Select(served_.handle, params, sink_, meanwhile);
  }

  ServedDocument served_;
  std::vector<float> queries_;
  RecordingSink sink_;
};

TEST_F(CacheClientTest, AsksTheShardsThatOwnTheHeadsAndReturnsWhenAllHaveAnswered) {
  ASSERT_TRUE(served_.Upload().ok());
  bool computed = false;
  const auto outcome = Select([&] {
    computed = true;
    EXPECT_TRUE(sink_.heads.size() < 4u) << "nothing was left to wait for";
  });
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_TRUE(outcome->complete);
  EXPECT_TRUE(computed);
  EXPECT_EQ(sink_.heads.size(), 4u);
  EXPECT_EQ(sink_.pages, 4 * 3);
}

TEST_F(CacheClientTest, SinksAndTailComeBackAsTheyWerePrefilled) {
  ASSERT_TRUE(served_.Upload().ok());
  SinkWindow fetched(served_.shape, 4, 8);
  ASSERT_TRUE(served_.client->FetchWindow(served_.handle, served_.grant.context, &fetched).ok());
  for (uint16_t l = 0; l < 2; ++l) {
    for (uint16_t h = 0; h < 4; ++h) {
      const LayerId layer(l);
      const KvHeadId head(h);
      const auto same = [](const TokenRows& a, const TokenRows& b) {
        return a.count == b.count && std::memcmp(a.k, b.k, a.count * a.row_bytes()) == 0 &&
               std::memcmp(a.v, b.v, a.count * a.row_bytes()) == 0;
      };
      EXPECT_TRUE(same(fetched.sinks(layer, head), served_.window_state.sinks(layer, head)));
      EXPECT_TRUE(same(fetched.window(layer, head), served_.window_state.window(layer, head)));
    }
  }
}

TEST_F(CacheClientTest, DamagedRowsAreDataLoss) {
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[1]->corrupt_pages = 1;
  SinkWindow fetched(served_.shape, 4, 8);
  EXPECT_EQ(served_.client->FetchWindow(served_.handle, served_.grant.context, &fetched).code(),
            StatusCode::kDataLoss);
}

TEST_F(CacheClientTest, BadPagesAreFetchedOnceMore) {
  ASSERT_TRUE(served_.Upload().ok());
  sink_.call_bad = 2;
  const auto outcome = Select();
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_TRUE(outcome->complete);
  EXPECT_EQ(sink_.refetched, 2);
}

TEST_F(CacheClientTest, ASilentShardCostsTheDeadlineAndNoMore) {
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[0]->silent_selects = 1;
  const Duration took = served_.Timed([&] {
    const auto outcome = Select();
    ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
    EXPECT_FALSE(outcome->complete);
    EXPECT_FALSE(outcome->confirmed);
  });
  EXPECT_GE(took, milliseconds(500));
  EXPECT_LT(took, milliseconds(1100));
  EXPECT_LT(sink_.heads.size(), 4u);
  sink_.heads.clear();
  EXPECT_TRUE(Select()->complete);  // the next one is whole again
  EXPECT_EQ(sink_.heads.size(), 4u);
}

TEST_F(CacheClientTest, ADeadShardIsUnavailableInBoundedTime) {
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[0]->Die();
  const Duration took = served_.Timed([&] {
    const auto outcome = Select();
    ASSERT_FALSE(outcome.ok());
    EXPECT_EQ(outcome.status().code(), StatusCode::kUnavailable);
    EXPECT_THAT(outcome.status().message(), ::testing::HasSubstr("shard 0"));
  });
  EXPECT_LT(took, milliseconds(1500));
  EXPECT_EQ(served_.client->Health().code(), StatusCode::kUnavailable);
}

class ReconnectTest : public CacheClientTest {
 protected:
  void SetUp() override {
    CacheClientOptions options;
    options.leases_alive = [this] { return leases_; };
    options.jitter_seed = 5;
    std::vector<std::string> addresses;
    for (const auto& shard : served_.shards) addresses.push_back(shard->address);
    served_.client =
        CacheClient::Connect(served_.loop.reactor, *served_.transport, addresses, options).value();
    ASSERT_TRUE(served_.Upload().ok());
  }
  Status leases_;
};

TEST_F(ReconnectTest, ALostConnectionComesBackAndTheSelectIsAskedAgain) {
  served_.shards[0]->Die();
  const auto outcome = Select();
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_TRUE(outcome->complete);
  EXPECT_EQ(sink_.heads.size(), 4u);
  EXPECT_EQ(served_.client->reconnects(), 1u);
  EXPECT_TRUE(served_.client->Health().ok());
  sink_.heads.clear();
  EXPECT_TRUE(Select()->complete);  // and stays
  EXPECT_EQ(sink_.heads.size(), 4u);
}

TEST_F(ReconnectTest, ALossWhileTheAnswerIsAwaitedIsRetriedOnce) {
  auto outcome = Select([&] { served_.shards[1]->Die(); });  // before it reads the request
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_TRUE(outcome->complete);
  EXPECT_EQ(sink_.heads.size(), 4u);
  served_.shards[1]->silent_selects =
      1;  // the second time as well: a miss of the deadline, no hang
  sink_.heads.clear();
  const Duration took = served_.Timed([&] {
    outcome = Select([&] { served_.shards[1]->Die(); });
    ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
    EXPECT_FALSE(outcome->complete);
  });
  EXPECT_LT(took, milliseconds(1100));
}

TEST_F(ReconnectTest, WithoutLivingLeasesTheLossIsReportedAtOnce) {
  served_.shards[0]->Die();
  leases_ = Unavailable("control connection lost");
  const Duration took =
      served_.Timed([&] { EXPECT_EQ(Select().status().code(), StatusCode::kUnavailable); });
  EXPECT_LT(took, milliseconds(100));
  EXPECT_EQ(served_.client->Health().code(), StatusCode::kUnavailable);
}

TEST_F(ReconnectTest, AShardThatIsGoneForGoodCostsTheDeadline) {
  served_.shards[0]->Die(true);
  const Duration took =
      served_.Timed([&] { EXPECT_EQ(Select().status().code(), StatusCode::kUnavailable); });
  EXPECT_GE(took, milliseconds(500));
  EXPECT_LT(took, milliseconds(1200));
}

TEST_F(CacheClientTest, ARefusalIsTheCallersError) {
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[2]->refused = 1;
  EXPECT_EQ(Select().status().code(), StatusCode::kFailedPrecondition);
}

TEST_F(CacheClientTest, MorePagesThanAskedForBreakTheProtocol) {
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[0]->extra_pages = 1;
  EXPECT_EQ(Select().status().code(), StatusCode::kDataLoss);
}

TEST_F(CacheClientTest, AnInterruptEndsAWait) {
  CacheClientOptions options;
  bool interrupted = false;
  options.interrupted = [&] { return interrupted; };
  std::vector<std::string> addresses;
  for (const auto& shard : served_.shards) addresses.push_back(shard->address);
  served_.client =
      CacheClient::Connect(served_.loop.reactor, *served_.transport, addresses, options).value();
  ASSERT_TRUE(served_.Upload().ok());
  served_.shards[0]->silent_selects = 1;
  const auto outcome = Select([&] { interrupted = true; });
  EXPECT_EQ(outcome.status().code(), StatusCode::kCancelled);
}

TEST_F(CacheClientTest, AnUploadStopsAtTheFirstError) {
  ASSERT_TRUE(served_.client->Attach(served_.grant).ok());
  served_.shards[1]->refused = 1;
  const Status status = served_.Upload();
  EXPECT_FALSE(status.ok());
}

TEST(CacheClient, AShardThatIsNotThereIsUnavailable) {
  test::TestLoop loop;
  const auto network = MakeLoopbackNetwork({});
  const auto transport = MakeLoopbackTransport(loop.reactor, network);
  auto client = CacheClient::Connect(loop.reactor, *transport, {"nobody:1"}, {});
  const Status status = client.ok() ? (*client)->Attach({}) : client.status();
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
}

}  // namespace
}  // namespace icecache
