// Workers and a server as real processes: one answer whatever serves the attention, and sharing.
// What happens when one of them dies: failure_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

class Workers : public ::testing::TestWithParam<const char*> {
 protected:
  // A prompt with one fact in its middle, and the question for it.
  void SetUp() override {
    WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(700)));
    WriteFile(dir_.path("question"), kFactQuestion);
  }
  std::vector<std::string> ServerArgs() const {
    return {"--memory-size", "512MiB",   "--threads",  "2",
            "--transports",  GetParam(), "--lease-ms", "1500"};
  }
  std::vector<std::string> Generate(const TestServer& server, std::vector<std::string> more) const {
    std::vector<std::string> args = {
        "generate", "--model",        SourcePath("tests/models/recall"),
        "--server", server.address(), "--transports",
        GetParam(), "--device",       "cpu"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  std::vector<std::string> Ask(const TestServer& server, const std::string& method,
                               const std::string& budget) const {
    return Generate(server,
                    {"--prompt-file", dir_.path("prompt"), "--question-file", dir_.path("question"),
                     "--method", method, "--budget", budget, "--max-new-tokens", "24"});
  }

  TempDir dir_;
};

// Shared memory (with TCP for connecting), and TCP alone.
INSTANTIATE_TEST_SUITE_P(Transports, Workers, ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

std::string Answer(const std::vector<std::string>& args) {
  Process worker("icecache-worker", args);
  const ProcessResult r = worker.Wait(100s);
  EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
  return worker.Out();
}

TEST_P(Workers, UnlimitedBudgetGeneratesWhatFullKvGenerates) {
  TestServer server(ServerArgs());
  const std::string full = Answer(Ask(server, "full_kv", "256"));
  EXPECT_THAT(full, HasSubstr(kFactAnswer));
  EXPECT_EQ(Answer(Ask(server, "icecache", "1000000")), full);
}

TEST_P(Workers, SmallBudgetFindsTheFact) {
  TestServer server(ServerArgs());
  EXPECT_THAT(Answer(Ask(server, "icecache", "64")), HasSubstr(kFactAnswer));
}

TEST_P(Workers, SecondWorkerForksWithoutPrefillAndTheDocumentIsHeldOnce) {
  TestServer server(ServerArgs());
  Answer(Generate(server, {"--prompt-file", dir_.path("prompt"), "--context", "doc", "--publish",
                           "--max-new-tokens", "0"}));
  const double held = server.StatusNumber("/memory/used_bytes");
  ASSERT_GT(held, 0);
  Process b("icecache-worker", Generate(server, {"--fork-of", "doc", "--question-file",
                                                 dir_.path("question"), "--max-new-tokens", "2"}));
  ASSERT_TRUE(b.Wait(60s).exited) << b.Err();
  EXPECT_THAT(b.Out(), HasSubstr(kFactAnswer)) << b.Err();
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"),
            held);  // B's private tail is gone, the document stays
}

TEST(WorkerProcess, MistakesAreNamed) {
  TempDir dir;
  Process no_model("icecache-worker",
                   {"generate", "--model", dir.path("absent"), "--prompt-file", "x"});
  EXPECT_NE(no_model.Wait(20s).exit_code, 0);
  EXPECT_THAT(no_model.Err(), HasSubstr("absent"));
  Process no_server("icecache-worker",
                    {"generate", "--model", SourcePath("tests/models/recall"), "--prompt-file",
                     SourcePath("LICENSE"), "--server", "127.0.0.1:1"});
  EXPECT_NE(no_server.Wait(30s).exit_code, 0);
  EXPECT_THAT(no_server.Err(), HasSubstr("127.0.0.1:1"));
  Process no_command("icecache-worker", {});
  EXPECT_NE(no_command.Wait(10s).exit_code, 0);
  EXPECT_THAT(no_command.Err() + no_command.Out(), HasSubstr("--help"));
}

}  // namespace
}  // namespace icecache::test
