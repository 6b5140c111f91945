// Who clusters a prefilled layer, with real processes: the worker's layouts make the server's pages
// and the model's words the same as the server's own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

class BuildOn : public ::testing::Test {
 protected:
  void SetUp() override { WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(450))); }
  std::string Run(const TestServer& server, const std::vector<std::string>& more) const {
    std::vector<std::string> args = {
        "generate",   "--model", SourcePath("tests/models/recall"), "--server", server.address(),
        "--kv-dtype", "f32"};
    args.insert(args.end(), more.begin(), more.end());
    Process worker("icecache-worker", args);
    const ProcessResult r = worker.Wait(100s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    EXPECT_EQ(worker.Err().find("left to the server"), std::string::npos) << worker.Err();
    return worker.Out();
  }
  void Publish(const TestServer& server, const std::string& build_on) const {
    Run(server, {"--prompt-file", dir_.path("prompt"), "--context", "doc", "--publish",
                 "--max-new-tokens", "0", "--build-on", build_on});
  }
  std::string Ask(const TestServer& server, const std::string& budget) const {
    return Run(server, {"--fork-of", "doc", "--question", kFactQuestion, "--budget", budget,
                        "--max-new-tokens", "16"});
  }
  TempDir dir_;
};

TEST_F(BuildOn, TheWorkersLayoutsChangeNeitherPagesNorTokens) {
  const TestServer server({"--memory-size", "256MiB", "--threads", "2"}),
      filing({"--memory-size", "256MiB", "--threads", "2"});
  Publish(server, "server");
  Publish(filing, "worker");
  const double used = server.StatusNumber("/memory/used_bytes");  // by pages, mostly
  EXPECT_GT(used, 100 * 2048);
  EXPECT_EQ(filing.StatusNumber("/memory/used_bytes"), used);
  // All tokens, and so few that pages have to be chosen well.
  for (const char* budget : {"1000000", "96"}) {
    const std::string said = Ask(server, budget);
    EXPECT_THAT(said, HasSubstr(kFactAnswer));
    EXPECT_EQ(Ask(filing, budget), said) << "budget " << budget;
  }
}

TEST_F(BuildOn, APolicyThatLaysPagesOutByItselfIsRefused) {
  Process worker("icecache-worker",
                 {"generate", "--model", SourcePath("tests/models/recall"), "--server",
                  "127.0.0.1:1", "--policy", "quest", "--build-on", "worker", "--prompt", "a"});
  const ProcessResult r = worker.Wait(60s);
  EXPECT_TRUE(r.exited && r.exit_code != 0);
  EXPECT_THAT(worker.Err(), HasSubstr("--build-on worker"));
}

}  // namespace
}  // namespace icecache::test
