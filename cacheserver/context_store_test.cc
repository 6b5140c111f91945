// ContextStore over the in-memory store, whose disk fills on demand; the test's time.
#include "cacheserver/context_store.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <string>

#include "cacheserver/store/cold_keys.h"
#include "cacheserver/test_client.h"
#include "common/limits.h"

namespace icecache {
namespace {

class ContextStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { QuietLog(); }
  void TearDown() override { pool_.Stop(); }
  // The pool's threads take real time.
  bool Eventually(const std::function<bool()>& condition) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!condition()) {
      if (std::chrono::steady_clock::now() > limit) return false;
      reactor_.Poll();
    }
    return true;
  }
  ContextManifest Manifest(const std::string& name) {
    ContextManifest manifest;
    manifest.tenant = "alice";
    manifest.name = name;
    manifest.shape = {
        .layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = 64, .dtype = DType::kF16};
    manifest.model = "tiny";
    manifest.named_by = SegmentId(7);
    manifest.segments = {{SegmentId(7), "alice", 0, 16, 16}};
    return manifest;
  }
  Status Wait(std::function<void(std::function<void(Status)>)> start) {
    std::optional<Status> got;
    start([&](const Status& status) { got = status; });
    EXPECT_TRUE(Eventually([&] { return got.has_value(); }));
    return got.value_or(Internal("no answer"));
  }
  Status Commit(const std::string& name) {
    return Wait([&](auto done) { store_.Commit(Manifest(name), std::move(done)); });
  }
  Status Forget(const std::string& name, std::vector<SegmentId> segments = {}) {
    return Wait(
        [&](auto done) { store_.Forget(Manifest(name), std::move(segments), std::move(done)); });
  }
  bool OnDisk(const std::string& name) {
    const auto value = pool_.store().Get(ColdColumn::kRecords,
                                         cold_keys::ContextRecord(SegmentId(7), "alice", name));
    return value.ok() && value->has_value();
  }
  // What is tried again now has been tried when this returns.
  void PassRetries() {
    clock_.Advance(limits::kStoreRetryTime + std::chrono::milliseconds(1));
    while (reactor_.Poll()) {
    }
    std::atomic<bool> behind = false;
    pool_.SubmitRecord([&] { behind = true; });
    EXPECT_TRUE(Eventually([&] { return behind.load(); }));
    while (reactor_.Poll()) {
    }
  }

  std::atomic<bool> full_ = false;
  MetricsRegistry metrics_;
  ManualClock clock_;
  Reactor reactor_{clock_, Duration::zero()};
  ColdPool pool_{MakeMemoryColdStore({[this](std::string_view op) {
                   return full_ && op != "get" ? ResourceExhausted("disk full") : OkStatus();
                 }}),
                 2, clock_, metrics_};
  ContextStore store_{reactor_, pool_};
};

TEST_F(ContextStoreTest, RecordThatWasCommittedAnewIsNotForgotten) {
  full_ = true;
  EXPECT_EQ(Commit("doc").code(), StatusCode::kResourceExhausted);
  // It may have reached the disk all the same, so it is taken back; which fails, too.
  EXPECT_EQ(Forget("doc").code(), StatusCode::kResourceExhausted);
  full_ = false;
  ASSERT_TRUE(Commit("doc").ok());
  PassRetries();
  EXPECT_TRUE(OnDisk("doc"));
}

TEST_F(ContextStoreTest, ForgettingIsRepeatedUntilTheRecordIsGone) {
  ASSERT_TRUE(Commit("doc").ok());
  ASSERT_TRUE(Commit("doc2").ok());
  full_ = true;
  EXPECT_EQ(Forget("doc").code(), StatusCode::kResourceExhausted);
  full_ = false;
  PassRetries();
  EXPECT_FALSE(OnDisk("doc"));
  EXPECT_TRUE(OnDisk("doc2"));
}

}  // namespace
}  // namespace icecache
