// Pages of other workers: real workers on emulated devices, in processes of their own, at a real
// server. Whatever becomes of the one that holds pages, the other gets what was uploaded.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <random>
#include <string>

#include "common/ucx_environment.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "tests/support/linked_worker.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"
#include "worker/layer_selection.h"
#include "worker/page_sharing.h"

namespace icecache::test {
namespace {

constexpr ModelShape kShape = LinkedWorker::kShape;
constexpr uint64_t kPagesOfStep = 2 * LinkedWorker::kPages;
// Workers of a test wait for each other without turning their loops, on a machine that is busy.
const std::string kLeaseMs = "120000";

// A worker on an emulated device, with a fork of a published context.
class SharingWorker {
 public:
  Status Join(const std::string& address, const std::string& parent,
              ReplyMode mode = ReplyMode::kAuto, const std::string& tenant = "",
              const std::string& owner = "") {
    ServerLinkOptions options;
    options.control.address = address;
    options.control.tenant = options.control.secret = tenant;
    options.cache.reply_mode = mode;
    options.cache.device = {true, PageWay::kAuto, intake_.get(), nullptr};
    options.sharing = sharing_.get();
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, worker_.Join(options, parent, owner));
    for (const wire::SegmentInfo& segment : grant.context.segments) {
      segments_.push_back(segment.id);
    }
    Forget();
    return OkStatus();
  }
  // No page is here any more.
  void Forget() {
    caches_.clear();
    for (uint32_t h = 0; h < 2; ++h) {
      caches_.emplace_back(kShape, LinkedWorker::kPages, arena_, sharing_.get(), h);
      caches_.back().RetainSegments(segments_);
    }
    selection_.emplace(kShape, caches_, intake_.get(), &stats_);
  }
  // OK: all pages are here and are what was uploaded.
  Status Step(const std::function<void()>& meanwhile = {}, const float* queries = nullptr) {
    const std::vector<KvHeadId> heads = {KvHeadId(0), KvHeadId(1)};
    const TokenPos end(LinkedWorker::kTokens);
    selection_->Begin(heads, {TokenPos(0), end, end.value}, nullptr);
    SelectParams params = worker_.Params();
    if (queries != nullptr) params.queries = queries;
    const auto outcome =
        worker_.link().cache().Select(worker_.context(), params, *selection_, meanwhile);
    KV_RETURN_IF_ERROR(outcome.status());
    if (!outcome->complete || selection_->any_missing()) return DataLoss("pages are missing");
    for (const KvHeadId head : heads) KV_RETURN_IF_ERROR(Check(head));
    return OkStatus();
  }
  Status StepAtRandom(std::mt19937_64& random) {
    std::normal_distribution<float> normal;
    std::vector<float> queries(size_t{kShape.query_heads} * kShape.head_dim);
    for (float& x : queries) x = normal(random);
    return Step({}, queries.data());
  }
  bool WaitForOthers(uint32_t count) {
    return worker_.link()
        .cache()
        .Wait([&] { return sharing_->other_count() == count; }, kPatience)
        .ok();
  }
  gpu::Device& device() { return *device_; }
  PageSharing& sharing() { return *sharing_; }
  ServerLink& link() { return worker_.link(); }
  const AttentionStats& stats() const { return stats_; }

 private:
  // The emulator's memory is the process's.
  Status Check(KvHeadId head) const {
    const PageCache& cache = caches_[head.value];
    std::vector<uint32_t> positions;
    cache.ListSelectedPositions(&positions);
    const size_t row = kShape.row_bytes();
    size_t at = 0;
    for (const PageId id : cache.selected()) {
      const PageView view = cache.view().pages[id.value];
      for (uint32_t i = 0; i < view.fill; ++i, ++at) {
        const size_t from = positions[at] * row;
        if (std::memcmp(view.k + i * row, worker_.rows().k(head).data() + from, row) != 0 ||
            std::memcmp(view.v + i * row, worker_.rows().v(head).data() + from, row) != 0) {
          return DataLoss("a wrong page at position " + std::to_string(positions[at]));
        }
      }
    }
    if (cache.selected().size() == LinkedWorker::kPages) return OkStatus();
    return DataLoss("pages are missing");
  }

  const std::unique_ptr<gpu::Device> device_ = gpu::MakeEmulatedDevice({});
  gpu::DeviceFrames frames_{*device_};
  const std::unique_ptr<gpu::PageIntake> intake_ = gpu::PageIntake::Make(*device_).value();
  const std::unique_ptr<PageSharing> sharing_ =
      PageSharing::Make(*device_, frames_, kShape, 128 * kShape.page_bytes()).value();
  PageArena arena_{kShape.page_bytes(), &frames_, intake_.get()};
  LinkedWorker worker_;
  AttentionStats stats_;
  std::vector<SegmentId> segments_;
  std::vector<PageCache> caches_;
  std::optional<LayerSelection> selection_;
};

class PageSharingProcesses : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
    ApplyUcxEnvironment();
    server_ = std::make_unique<TestServer>(std::vector<std::string>{
        "--memory-size", "256MiB", "--threads", "2", "--lease-ms", kLeaseMs});
    ServerLinkOptions options;
    options.control.address = server_->address();
    ASSERT_EQ(author_.Open(options).ToString(), "OK");
    ASSERT_EQ(author_.Publish().ToString(), "OK");
  }
  // A process that holds pages of the context, and replaces them all the time or never.
  std::unique_ptr<Process> Giver(const std::string& what) {
    auto giver = std::make_unique<Process>(
        "/proc/self/exe",
        std::vector<std::string>{"--giver", server_->address(), author_.name(), what});
    EXPECT_TRUE(giver->WaitForOutput("holding", Seconds(60))) << giver->Err();
    return giver;
  }
  bool WaitForSharing(double count) {
    return server_->WaitForMetric("icecache_sharing_workers",
                                  [&](double now) { return now == count; });
  }
  std::unique_ptr<TestServer> server_;
  LinkedWorker author_;
};

TEST_F(PageSharingProcesses, ASecondWorkerCopiesWhatTheFirstHolds) {
  const auto giver = Giver("keep");
  for (const ReplyMode mode : {ReplyMode::kInline, ReplyMode::kMapped}) {
    SCOPED_TRACE(ReplyModeName(mode));
    SharingWorker taker;
    ASSERT_EQ(taker.Join(server_->address(), author_.name(), mode).ToString(), "OK");
    EXPECT_EQ(taker.sharing().other_count(), 1u);
    const double sent = server_->Metric("icecache_pages_returned_total");
    EXPECT_EQ(taker.Step().ToString(), "OK");
    EXPECT_EQ(taker.stats().worker_pages, kPagesOfStep);
    EXPECT_EQ(taker.stats().page_misses, kPagesOfStep);
    EXPECT_EQ(taker.stats().mapped_pages, 0u);
    EXPECT_EQ(server_->Metric("icecache_pages_returned_total"), sent);
    EXPECT_EQ(taker.Step().ToString(), "OK");
    EXPECT_EQ(taker.stats().page_hits, kPagesOfStep);
  }
}

TEST_F(PageSharingProcesses, AGiverThatIsKilledCostsNoPage) {
  SharingWorker taker;
  ASSERT_EQ(taker.Join(server_->address(), author_.name()).ToString(), "OK");
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    const auto giver = Giver(round % 2 == 0 ? "churn" : "keep");
    ASSERT_TRUE(taker.WaitForOthers(1));
    taker.Forget();
    // Its pages are named in the request, and it dies before the answer is handled.
    EXPECT_EQ(taker
                  .Step([&] {
                    giver->Signal(SIGKILL);
                    giver->Wait(Seconds(20));
                  })
                  .ToString(),
              "OK");
    EXPECT_TRUE(WaitForSharing(1));  // the taker itself
    ASSERT_TRUE(taker.WaitForOthers(0));
    const uint64_t before = taker.stats().worker_pages;
    taker.Forget();
    EXPECT_EQ(taker.Step().ToString(), "OK");
    EXPECT_EQ(taker.stats().worker_pages, before);
  }
}

TEST_F(PageSharingProcesses, AGiverThatReplacesItsPagesIsCopiedFromAndNeverWrongly) {
  const auto giver = Giver("churn");
  SharingWorker taker;
  ASSERT_EQ(taker.Join(server_->address(), author_.name()).ToString(), "OK");
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  // However the machine schedules the two: until it has found a page that was there long enough.
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(200);
  for (int step = 0;
       step < 12 || (taker.stats().worker_pages == 0 && std::chrono::steady_clock::now() < limit);
       ++step) {
    taker.Forget();
    ASSERT_EQ(taker.StepAtRandom(random).ToString(), "OK") << step;
  }
  EXPECT_GT(taker.stats().worker_pages, 0u);
  EXPECT_EQ(taker.stats().worker_damaged, 0u);
  EXPECT_EQ(taker.stats().bad_pages, 0u);
  EXPECT_TRUE(giver->Running()) << giver->Err();
}

TEST_F(PageSharingProcesses, ADamagedFrameIsFetchedInstead) {
  const auto giver = Giver("keep");
  SharingWorker taker;
  ASSERT_EQ(taker.Join(server_->address(), author_.name()).ToString(), "OK");
  // What the server tells the taker, it tells this test.
  std::optional<std::vector<wire::SharedFrames>> others;
  taker.link().control().ShareFrames(taker.sharing().offer(), [&](const auto& answer) {
    if (answer.ok()) others = *answer;
  });
  ASSERT_TRUE(taker.link().cache().Wait([&] { return others.has_value(); }, kPatience).ok());
  ASSERT_EQ(others->size(), 1u);
  const std::span<std::byte> frames = taker.device().Open(others->at(0).memory).value();
  for (size_t at = 5; at < frames.size(); at += kShape.page_bytes()) frames[at] ^= std::byte{1};
  taker.device().Close(frames.data());
  EXPECT_EQ(taker.Step().ToString(), "OK");
  EXPECT_EQ(taker.stats().worker_pages, 0u);
  EXPECT_EQ(taker.stats().worker_damaged, kPagesOfStep);
  EXPECT_EQ(taker.stats().page_misses, kPagesOfStep);
  EXPECT_EQ(taker.stats().bad_pages, 0u);
}

TEST_F(PageSharingProcesses, AServerThatIsGoneNamesNobody) {
  const auto giver = Giver("keep");
  SharingWorker taker;
  ASSERT_EQ(taker.Join(server_->address(), author_.name()).ToString(), "OK");
  EXPECT_EQ(taker.sharing().other_count(), 1u);
  server_->process().Signal(SIGKILL);
  EXPECT_TRUE(taker.WaitForOthers(0));
}

TEST(PageSharingTenants, AnotherTenantsWorkerOnTheSameHostGetsNothing) {
  if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
  ApplyUcxEnvironment();
  TempDir dir;
  WriteFile(dir.path("tokens.toml"), TenantEntry("alice", "alice") + TenantEntry("bob", "bob"));
  TestServer server({"--memory-size", "256MiB", "--threads", "2", "--lease-ms", kLeaseMs,
                     "--token-file", dir.path("tokens.toml")});
  LinkedWorker author;
  ServerLinkOptions options;
  options.control.address = server.address();
  options.control.tenant = options.control.secret = "alice";
  ASSERT_EQ(author.Open(options).ToString(), "OK");
  ASSERT_EQ(author.Publish(true).ToString(), "OK");
  SharingWorker alice, second, bob;
  ASSERT_EQ(alice.Join(server.address(), author.name(), ReplyMode::kAuto, "alice").ToString(),
            "OK");
  ASSERT_EQ(alice.Step().ToString(), "OK");
  // The same segments, even, since she has shared them with all tenants.
  ASSERT_EQ(bob.Join(server.address(), author.name(), ReplyMode::kAuto, "bob", "alice").ToString(),
            "OK");
  EXPECT_EQ(bob.sharing().other_count(), 0u);
  EXPECT_EQ(bob.Step().ToString(), "OK");
  EXPECT_EQ(bob.stats().worker_pages, 0u);
  EXPECT_EQ(bob.stats().page_misses, kPagesOfStep);
  ASSERT_EQ(second.Join(server.address(), author.name(), ReplyMode::kAuto, "alice").ToString(),
            "OK");
  EXPECT_EQ(second.sharing().other_count(), 1u);  // alice's, and not bob's
  EXPECT_EQ(second.Step().ToString(), "OK");
  EXPECT_EQ(second.stats().worker_pages, kPagesOfStep);
}

// The program, as it is used: another worker's pages change nothing but where pages come from.
TEST(PageSharingGeneration, TextIsTheSameWithPagesOfAnotherWorker) {
  if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
  TempDir dir;
  std::string text;
  for (int i = 0; i < 6; ++i) text += " the work of others, and";
  WriteFile(dir.path("prompt"), FactPrompt(text.substr(1)));
  WriteFile(dir.path("question"), kFactQuestion);
  TestServer server({"--memory-size", "512MiB", "--threads", "1", "--lease-ms", kLeaseMs});
  const auto start = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {"generate",
                                     "--model",
                                     SourcePath("tests/models/recall"),
                                     "--server",
                                     server.address(),
                                     "--budget",
                                     "48",
                                     "--select-deadline",
                                     "60s",
                                     "--log-level",
                                     "info",
                                     "--reply-mode",
                                     "inline"};
    args.insert(args.end(), more.begin(), more.end());
    return std::make_unique<Process>("icecache-worker", args);
  };
  const auto finish = [](Process& worker) {
    const ProcessResult r = worker.Wait(Seconds(500));  // the emulator takes its time
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    return worker.Out();
  };
  const auto fork = [&](const std::string& device, const std::string& tokens, bool share) {
    std::vector<std::string> args = {
        "--device",         device, "--fork-of", "doc", "--question-file", dir.path("question"),
        "--max-new-tokens", tokens};
    if (share) args.insert(args.end(), {"--share-pages", "1MiB", "--ignore-eos"});
    return start(args);
  };
  finish(*start({"--device", "cpu", "--prompt-file", dir.path("prompt"), "--context", "doc",
                 "--publish", "--max-new-tokens", "0"}));
  const std::string expected = finish(*fork("cpu", "3", false));
  ASSERT_NE(expected.find("oslo"), std::string::npos) << expected;
  const auto giver = fork("emulated", "1000", true);
  ASSERT_TRUE(giver->WaitForOutput("oslo", Seconds(500))) << giver->Err();
  const auto taker = fork("emulated", "3", true);
  EXPECT_EQ(finish(*taker), expected);
  const std::string said = taker->Err();
  EXPECT_NE(said.find("another worker's pages"), std::string::npos) << said;
  EXPECT_NE(said.find("pages copied from other workers"), std::string::npos) << said;
  EXPECT_EQ(said.find("shared     0 pages"), std::string::npos) << said;
  EXPECT_TRUE(giver->Running()) << giver->Err();
}

int Report(const Status& status) {
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}

// The process that holds pages.
int RunGiver(const char* address, const char* parent, const std::string& what) {
  ApplyUcxEnvironment();
  SharingWorker worker;
  if (const Status joined = worker.Join(address, parent); !joined.ok()) return Report(joined);
  Status status = worker.Step();
  if (!status.ok()) return Report(status);
  std::printf("holding\n");
  std::fflush(stdout);
  std::mt19937_64 random(1);
  while (status.ok()) {
    status = what == "churn" ? worker.StepAtRandom(random) : worker.link().Pump();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return Report(status);
}

}  // namespace
}  // namespace icecache::test

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == "--giver") {
    return icecache::test::RunGiver(argv[2], argv[3], argv[4]);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
