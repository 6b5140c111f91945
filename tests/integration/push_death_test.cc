// Page way "ipc" between processes that die: a worker while the server writes into its memory, a
// server while a worker reads there.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <string>

#include "common/ucx_environment.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/gpu/push_buffer.h"
#include "tests/support/linked_worker.h"
#include "tests/support/process.h"
#include "worker/layer_selection.h"

namespace icecache::test {
namespace {

constexpr ModelShape kShape = LinkedWorker::kShape;
constexpr uint64_t kPagesOfStep = 2 * LinkedWorker::kPages;

// A worker on an emulated device that keeps no page from step to step.
class PushedWorker {
 public:
  Status Open(const std::string& address) {
    ServerLinkOptions options;
    options.control.address = address;
    options.cache.device = {true, PageWay::kIpc, intake_.get(), &push_};
    worker_ = std::make_unique<LinkedWorker>();
    return worker_->Open(options);
  }
  // OK: all pages came, and are what the server says that they are.
  Status Step(const std::function<void()>& meanwhile = {}) {
    PageArena arena(kShape.page_bytes(), &frames_, intake_.get());
    std::vector<PageCache> caches;
    for (int h = 0; h < 2; ++h) caches.emplace_back(kShape, LinkedWorker::kPages, arena);
    LayerSelection selection(kShape, caches, intake_.get(), &stats_);
    const std::vector<KvHeadId> heads = {KvHeadId(0), KvHeadId(1)};
    const TokenPos end(LinkedWorker::kTokens);
    selection.Begin(heads, {TokenPos(0), end, end.value}, nullptr);
    const uint64_t before = stats_.page_misses;
    const auto outcome =
        worker_->link().cache().Select(worker_->context(), worker_->Params(), selection, meanwhile);
    KV_RETURN_IF_ERROR(outcome.status());
    if (outcome->complete && stats_.page_misses - before == kPagesOfStep) return OkStatus();
    return DataLoss("pages are missing");
  }
  void Close() { worker_.reset(); }
  const AttentionStats& stats() const { return stats_; }

 private:
  const std::unique_ptr<gpu::Device> device_ = gpu::MakeEmulatedDevice({});
  gpu::DeviceFrames frames_{*device_};
  const std::unique_ptr<gpu::PageIntake> intake_ = gpu::PageIntake::Make(*device_).value();
  gpu::PushBuffer push_{*device_};
  AttentionStats stats_;
  std::unique_ptr<LinkedWorker> worker_;
};

class PushDeath : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
    ApplyUcxEnvironment();
    server_ = std::make_unique<TestServer>(std::vector<std::string>{
        "--memory-size", "256MiB", "--threads", "2", "--push-pages", "emulated"});
  }
  std::unique_ptr<TestServer> server_;
};

TEST_F(PushDeath, AServerOutlivesWorkersThatDieWhileItWrites) {
  double pushed = 0;
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    Process worker("/proc/self/exe", {"--pushed-worker", server_->address()});
    ASSERT_TRUE(server_->WaitForMetric("icecache_pages_pushed_total", [&](double now) {
      return now >= pushed + 3 * kPagesOfStep;
    })) << worker.Err();
    worker.Signal(SIGKILL);
    worker.Wait(Seconds(20));
    pushed = server_->Metric("icecache_pages_pushed_total");
    // Its memory is let go.
    EXPECT_TRUE(
        server_->WaitForMetric("icecache_push_targets", [](double open) { return open == 0; }));
  }
  EXPECT_TRUE(server_->process().Running());
}

TEST_F(PushDeath, AWorkerOutlivesAServerThatDies) {
  PushedWorker worker;
  ASSERT_EQ(worker.Open(server_->address()).ToString(), "OK");
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    const uint64_t before = worker.stats().pushed_pages;
    EXPECT_EQ(worker.Step().ToString(), "OK");
    EXPECT_EQ(worker.stats().pushed_pages, before + kPagesOfStep);
    // Whether the answers were there already is chance; what came of them is right or not used.
    (void)worker.Step([&] { server_->process().Signal(SIGKILL); });
    worker.Close();
    server_->Restart();
    ASSERT_EQ(worker.Open(server_->address()).ToString(), "OK");
  }
}

TEST(PushPages, AServerWithoutAGpuSaysSo) {
  const auto gpus = gpu::CountCudaDevices();
  if (gpus.ok()) GTEST_SKIP() << "there is a GPU";
  TestServer server({"--memory-size", "256MiB", "--push-pages", "auto"});
  const std::string log = server.process().Err();
  EXPECT_NE(log.find("no pages are pushed to GPUs"), std::string::npos) << log;
  EXPECT_NE(log.find(gpus.status().message()), std::string::npos) << log;
}

// The process that is killed.
int RunWorker(const char* address) {
  ApplyUcxEnvironment();
  PushedWorker worker;
  Status status = worker.Open(address);
  for (int i = 0; i < 100 && !status.ok(); ++i) {  // names of one that was killed may be taken yet
    status = worker.Open(address);
  }
  while (status.ok()) status = worker.Step();
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}

}  // namespace
}  // namespace icecache::test

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--pushed-worker") {
    return icecache::test::RunWorker(argv[2]);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
