// Two real workers with one prompt: the second finds what the first has prefilled, runs only the rest,
// and says the same; and a worker that goes on at an earlier token.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class PrefixWorker : public ::testing::Test {
 protected:
  PrefixWorker() {
    const std::string text = ReadFile(SourcePath("LICENSE"));
    WriteFile(dir_.path("prompt"), "<bos> " + text.substr(0, 6000));
    WriteFile(dir_.path("longer"), "<bos> " + text.substr(0, 6100));
    WriteFile(dir_.path("other"), "<bos> " + text.substr(3000, 4000));
  }
  // What it says; *err: its summary.
  std::string Generate(std::vector<std::string> more, std::string* err) {
    std::vector<std::string> args = {"generate",      "--model",  SourcePath("tests/models/recall"),
                                     "--server",      server_.address(),
                                     "--device",      "cpu",
                                     "--budget",      "1000000",
                                     "--ignore-eos"};
    args.insert(args.end(), more.begin(), more.end());
    Process worker("icecache-worker", args);
    const ProcessResult r = worker.Wait(std::chrono::seconds(120));
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    *err = worker.Err();
    return worker.Out();
  }
  std::string Ask(const std::string& prompt, const std::string& match, std::string* err) {
    return Generate({"--prompt-file", dir_.path(prompt), "--question", "the license", "--match",
                     match, "--max-new-tokens", "40"},
                    err);
  }

  TempDir dir_;
  TestServer server_{{"--memory-size", "256MiB", "--threads", "2"}};
};

TEST_F(PrefixWorker, ASecondWorkerFindsThePrefillOfTheFirstAndSaysTheSame) {
  std::string err;
  const std::string alone = Ask("prompt", "own", &err);  // nothing to find yet
  EXPECT_THAT(err, HasSubstr("prefill"));
  const std::string longer_alone = Ask("longer", "off", &err);
  (void)Generate({"--prompt-file", dir_.path("prompt"), "--context", "doc", "--publish",
                  "--max-new-tokens", "0"},
                 &err);
  EXPECT_EQ(Ask("prompt", "own", &err), alone);
  EXPECT_THAT(err, HasSubstr("tokens of the prompt were there"));
  EXPECT_THAT(err, Not(HasSubstr("prefill  ")));
  EXPECT_EQ(Ask("longer", "own", &err), longer_alone);
  EXPECT_THAT(err, HasSubstr("tokens of the prompt were there"));
  (void)Ask("other", "own", &err);
  EXPECT_THAT(err, HasSubstr("prefill  "));
  EXPECT_THAT(server_.HttpGet("/metrics"), HasSubstr("icecache_prefix_matches_total{result=\"hit\"} 2"));
}

TEST_F(PrefixWorker, AForkAtATokenGoesOnAsIfThePromptHadEndedThere) {
  std::string err;
  (void)Generate({"--prompt-file", dir_.path("longer"), "--context", "doc", "--publish",
                  "--max-new-tokens", "0"},
                 &err);
  const std::vector<std::string> ask = {"--fork-of", "doc", "--question", "the license",
                                        "--max-new-tokens", "30"};
  std::vector<std::string> early = ask;
  early.insert(early.end(), {"--fork-at", "700"});
  const std::string first = Generate(early, &err);
  EXPECT_FALSE(first.empty());
  EXPECT_EQ(Generate(early, &err), first);
  Process ctl("icecachectl", {"fork", "doc", "early", "--at", "700", "--server", server_.address()});
  ASSERT_TRUE(ctl.Wait(std::chrono::seconds(20)).exited) << ctl.Err();
  std::vector<std::string> named = ask;
  named[1] = "early";
  EXPECT_EQ(Generate(named, &err), first);
}

}  // namespace
}  // namespace icecache::test
