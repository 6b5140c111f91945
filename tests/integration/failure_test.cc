// What the other side sees when a server or a worker dies or stops, with real processes over shared
// memory and TCP: it is noticed, every request ends, memory comes back to the byte, and who can go
// on goes on. transport_death_test.cc has the same of a bare connection, tests/chaos of everything
// at once.
//
// Times are compared with what heartbeats and deadlines promise. A busy machine may delay any
// single one, so the best of a few shows what the code does, and the worst only that it ends.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/support/linked_worker.h"
#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using std::chrono_literals::operator""ms;
using ::testing::HasSubstr;
using SteadyClock = std::chrono::steady_clock;

constexpr Duration kSilence = limits::kHeartbeatInterval * limits::kHeartbeatMisses;

int64_t Millis(Duration d) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(d).count();
}

void ExpectBestWithin(std::vector<Duration> took, Duration bound) {
  std::sort(took.begin(), took.end());
  std::printf("%ld to %ld ms\n", static_cast<long>(Millis(took.front())),
              static_cast<long>(Millis(took.back())));
  EXPECT_LE(Millis(took.front()), Millis(bound));
}

class Failures : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(700))); }
  std::vector<std::string> ServerArgs(std::vector<std::string> more = {}) const {
    std::vector<std::string> args = {"--memory-size", "512MiB",  "--threads", "2",
                                     "--transports",  GetParam()};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  static ServerLinkOptions LinkTo(const TestServer& server) {
    ServerLinkOptions options;
    options.control.address = server.address();
    options.ucx.transports = GetParam();
    return options;
  }
  std::vector<std::string> Generate(const TestServer& server, std::vector<std::string> more) const {
    std::vector<std::string> args = {
        "generate", "--model",        SourcePath("tests/models/recall"),
        "--server", server.address(), "--transports",
        GetParam(), "--device",       "cpu"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  // Never ends by itself.
  std::vector<std::string> GenerateOnAndOn(const TestServer& server) const {
    return Generate(server, {"--prompt-file", dir_.path("prompt"), "--max-new-tokens", "1000000",
                             "--budget", "64", "--ignore-eos"});
  }
  // Everything that the server accounts for: memory of tenants and shards, leases, contexts.
  static nlohmann::json Ledger(const TestServer& server) {
    nlohmann::json ledger;
    for (const char* topic : {"memory", "leases", "contexts"}) {
      Process ctl("icecachectl", {topic, "--json", "--server", server.address()});
      EXPECT_EQ(ctl.Wait(20s).exit_code, 0) << ctl.Err();
      ledger[topic] = nlohmann::json::parse(ctl.Out(), nullptr, false);
    }
    for (auto& shard : ledger["memory"]["shards"]) shard.erase("connections");
    return ledger;
  }
  static void ExpectLedgerComesBack(const TestServer& server, const nlohmann::json& before) {
    const auto end = SteadyClock::now() + kPatience;
    nlohmann::json now;
    do {
      now = Ledger(server);
    } while (now != before && SteadyClock::now() < end);
    EXPECT_EQ(now, before) << nlohmann::json::diff(before, now).dump(1);
  }

  TempDir dir_;
};

// Shared memory (with TCP for connecting), and TCP alone.
INSTANTIATE_TEST_SUITE_P(Transports, Failures, ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

// ---- of the server
// -------------------------------------------------------------------------------

TEST_P(Failures, KilledServerEndsWhatIsInFlightAtOnce) {
  std::vector<Duration> took;
  for (int i = 0; i < 3; ++i) {
    TestServer server(ServerArgs());
    LinkedWorker worker;
    ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
    ASSERT_TRUE(worker.Select(kPatience).ok());
    server.process().Freeze();  // it dies with the request unanswered
    SteadyClock::time_point killed;
    const Status status = worker.Select(kPatience, [&] {
      killed = SteadyClock::now();
      server.process().Signal(SIGKILL);
    });
    took.push_back(SteadyClock::now() - killed);
    EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
  }
  // Sooner than heartbeats could tell.
  ExpectBestWithin(took, 250ms);
}

TEST_P(Failures, StoppedServerIsNoticedByItsSilenceAndUsedAgainWhenItGoesOn) {
  TestServer server(ServerArgs({"--lease-ms", "60000"}));
  LinkedWorker worker;
  ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
  std::vector<Duration> took;
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(worker.Select(kPatience).ok());
    server.process().Freeze();
    const auto stopped = SteadyClock::now();
    ASSERT_TRUE(worker.WaitReady(false));
    took.push_back(SteadyClock::now() - stopped);
    EXPECT_GE(took.back(), kSilence - 2 * limits::kHeartbeatInterval) << "too impatient";
    server.process().Signal(SIGCONT);
    ASSERT_TRUE(worker.WaitReady(true)) << "the context is attached again by itself";
  }
  EXPECT_TRUE(worker.Select(kPatience).ok());
  ExpectBestWithin(took, kSilence * 3 / 2);
}

TEST_P(Failures, DeadlineOfASelectIsKeptWhileTheServerIsStopped) {
  TestServer server(ServerArgs());
  LinkedWorker worker;
  ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
  constexpr Duration kDeadline = 200ms;
  std::vector<Duration> late;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(worker.Select(kPatience).ok());
    server.process().Freeze();
    const auto start = SteadyClock::now();
    EXPECT_EQ(worker.Select(kDeadline).code(), StatusCode::kDeadlineExceeded);
    late.push_back(SteadyClock::now() - start - kDeadline);
    server.process().Signal(SIGCONT);
  }
  EXPECT_GE(*std::min_element(late.begin(), late.end()), Duration(0));
  ExpectBestWithin(late, 10ms);
}

TEST_P(Failures, KilledServerEndsTheWorkerWithAClearError) {
  TestServer server(ServerArgs());
  Process worker("icecache-worker", GenerateOnAndOn(server));
  ASSERT_TRUE(worker.WaitForOutput(" the ", 60s)) << worker.Err();
  server.process().Signal(SIGKILL);
  const ProcessResult r = worker.Wait(kPatience);
  ASSERT_TRUE(r.exited) << "still running";
  EXPECT_NE(r.exit_code, 0);
  EXPECT_THAT(worker.Err(), HasSubstr("UNAVAILABLE"));
}

TEST_P(Failures, StoppedServerEndsTheWorkerWithAClearError) {
  TestServer server(ServerArgs());
  Process worker("icecache-worker", GenerateOnAndOn(server));
  ASSERT_TRUE(worker.WaitForOutput(" the ", 60s)) << worker.Err();
  server.process().Freeze();
  const ProcessResult r = worker.Wait(kPatience);
  ASSERT_TRUE(r.exited) << "still running";
  EXPECT_NE(r.exit_code, 0);
  EXPECT_THAT(worker.Err(),
              ::testing::AnyOf(HasSubstr("UNAVAILABLE"), HasSubstr("DEADLINE_EXCEEDED")));
  server.process().Signal(SIGCONT);
}

// A worker whose server is killed goes on by itself on a new fork of the durable document, and says
// what it would have said.
TEST_P(Failures, WorkerResumesWhenTheServerIsBackWithTheDurableContext) {
  TestServer server(ServerArgs({"--data-dir", dir_.path("data")}));
  WriteFile(dir_.path("prompt"),
            "<bos> the king of the north went to the sea and the sea was cold " +
                ReadFile(SourcePath("LICENSE")).substr(0, 6000));
  {
    Process writer("icecache-worker",
                   Generate(server, {"--prompt-file", dir_.path("prompt"), "--context", "doc",
                                     "--publish", "--durable", "--max-new-tokens", "0"}));
    const ProcessResult r = writer.Wait(100s);
    ASSERT_TRUE(r.exited && r.exit_code == 0) << writer.Err();
  }
  const std::vector<std::string> ask =
      Generate(server, {"--fork-of", "doc", "--question", "the north", "--max-new-tokens", "600",
                        "--ignore-eos", "--budget", "1000000"});
  Process undisturbed("icecache-worker", ask);
  ASSERT_TRUE(undisturbed.Wait(100s).exited);
  Process worker("icecache-worker", ask);
  const std::string all = undisturbed.Out();
  ASSERT_TRUE(worker.WaitForOutput(all.substr(0, all.size() / 8), 60s));
  server.process().Signal(SIGKILL);
  server.process().Wait(10s);
  server.Restart();
  const auto back = SteadyClock::now();
  EXPECT_TRUE(worker.WaitForOutput("resumed on a new fork", kPatience)) << worker.Err();
  std::printf("resumed %.2f s after the server was ready\n",
              std::chrono::duration<double>(SteadyClock::now() - back).count());
  const ProcessResult r = worker.Wait(100s);
  EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
  EXPECT_EQ(worker.Out(), undisturbed.Out());
}

// What a server lacks for one more worker takes nothing from those that it has.
TEST_P(Failures, WorkerBeyondTheFileLimitIsRefusedWithTheRemedyAndTheOthersGoOn) {
  TestServer server(ServerArgs());
  LinkedWorker worker;
  ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
  const pid_t pid = server.process().pid();
  rlimit limit{};
  ASSERT_EQ(::prlimit(pid, RLIMIT_NOFILE, nullptr, &limit), 0);
  EXPECT_EQ(limit.rlim_cur, limit.rlim_max) << "raised at start";
  std::set<rlim_t> open;
  for (const auto& file :
       std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd"))
    open.insert(std::stoul(file.path().filename()));
  rlimit tight{0, limit.rlim_max};  // room for ten, enough for a control connection
  for (int room = 10; room > 0; ++tight.rlim_cur) room -= !open.contains(tight.rlim_cur);
  ASSERT_EQ(::prlimit(pid, RLIMIT_NOFILE, &tight, nullptr), 0);
  LinkedWorker another;
  const Status refused = another.Open(LinkTo(server));
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable) << refused.ToString();
  EXPECT_THAT(refused.message(), HasSubstr("its log says why"));
  EXPECT_TRUE(server.process().WaitForOutput("ulimit -n", 10s)) << server.process().Err();
  EXPECT_EQ(worker.Select(kPatience).ToString(), "OK");
  ASSERT_EQ(::prlimit(pid, RLIMIT_NOFILE, &limit, nullptr), 0);
  EXPECT_EQ(another.Open(LinkTo(server)).ToString(), "OK");
}

// ---- of a worker
// ---------------------------------------------------------------------------------

TEST_P(Failures, KilledWorkerLeavesNothingAndTheOtherGoesOn) {
  WriteFile(dir_.path("question"), kFactQuestion);
  TestServer server(ServerArgs({"--lease-ms", "1500"}));
  const nlohmann::json before = Ledger(server);
  Process a("icecache-worker", GenerateOnAndOn(server));
  ASSERT_TRUE(a.WaitForOutput(" the ", 60s)) << a.Err();
  EXPECT_NE(Ledger(server), before);
  Process b("icecache-worker",
            Generate(server, {"--prompt-file", dir_.path("prompt"), "--question-file",
                              dir_.path("question"), "--max-new-tokens", "400"}));
  a.Signal(SIGKILL);
  const ProcessResult r = b.Wait(100s);
  EXPECT_TRUE(r.exited && r.exit_code == 0) << b.Err();
  EXPECT_THAT(b.Out(), HasSubstr(kFactAnswer));
  ExpectLedgerComesBack(server, before);
}

// Its connections stand, but nobody renews its lease.
TEST_P(Failures, StoppedWorkerLosesItsLeaseAndLeavesNothing) {
  TestServer server(ServerArgs({"--lease-ms", "1500"}));
  const nlohmann::json before = Ledger(server);
  Process worker("icecache-worker", GenerateOnAndOn(server));
  ASSERT_TRUE(worker.WaitForOutput(" the ", 60s)) << worker.Err();
  worker.Freeze();
  ExpectLedgerComesBack(server, before);
  worker.Signal(SIGCONT);
  const ProcessResult r = worker.Wait(kPatience);
  ASSERT_TRUE(r.exited) << "it goes on without a lease";
  EXPECT_NE(r.exit_code, 0);
}

}  // namespace
}  // namespace icecache::test
