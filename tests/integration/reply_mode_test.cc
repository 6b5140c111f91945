// The ways in which pages come to a worker, with real processes: each gives the same answer, and
// each is what was used.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;
using ::testing::Not;

class ReplyModes : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(500)));
    WriteFile(dir_.path("question"), kFactQuestion);
  }
  // stdout; stderr goes to *err.
  std::string Answer(const TestServer& server, const std::string& mode, std::string* err,
                     const std::vector<std::string>& more = {}) {
    std::vector<std::string> args = {"generate",
                                     "--model",
                                     SourcePath("tests/models/recall"),
                                     "--server",
                                     server.address(),
                                     "--transports",
                                     GetParam(),
                                     "--prompt-file",
                                     dir_.path("prompt"),
                                     "--question-file",
                                     dir_.path("question"),
                                     "--budget",
                                     "96",
                                     "--max-new-tokens",
                                     "24",
                                     "--log-level",
                                     "info",
                                     "--reply-mode",
                                     mode};
    args.insert(args.end(), more.begin(), more.end());
    Process worker("icecache-worker", args);
    const ProcessResult r = worker.Wait(100s);
    *err = worker.Err();
    EXPECT_TRUE(r.exited && r.exit_code == 0) << *err;
    return worker.Out();
  }
  TempDir dir_;
};

INSTANTIATE_TEST_SUITE_P(Transports, ReplyModes,
                         ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

TEST_P(ReplyModes, GiveTheSameTokens) {
  TestServer server({"--memory-size", "256MiB", "--threads", "2", "--transports", GetParam()});
  std::string err;
  const std::string sent = Answer(server, "inline", &err);
  EXPECT_THAT(sent, HasSubstr(kFactAnswer));
  EXPECT_THAT(err, Not(HasSubstr("read in the server's memory")));
  EXPECT_GT(server.Metric("icecache_pages_sent_total"), 0);
  EXPECT_EQ(server.Metric("icecache_pages_mapped_total"), 0);
  EXPECT_EQ(server.Metric("icecache_pages_attended_total"), 0);

  const double sent_pages = server.Metric("icecache_pages_sent_total");
  EXPECT_EQ(Answer(server, "mapped", &err), sent);
  EXPECT_THAT(err, HasSubstr("pages      0 sent"));
  EXPECT_THAT(err, Not(HasSubstr("caution")));
  EXPECT_EQ(server.Metric("icecache_pages_sent_total"), sent_pages);
  EXPECT_GT(server.Metric("icecache_pages_mapped_total"), 0);

  EXPECT_EQ(Answer(server, "attend", &err), sent);
  EXPECT_THAT(err, HasSubstr("pages      0 sent, 0 read"));
  EXPECT_EQ(server.Metric("icecache_pages_sent_total"), sent_pages);
  EXPECT_GT(server.Metric("icecache_pages_attended_total"), 0);

  EXPECT_EQ(Answer(server, "auto", &err), sent);
  EXPECT_THAT(err, HasSubstr("on this host"));
  EXPECT_THAT(err, HasSubstr("pages      0 sent"));
}

TEST_P(ReplyModes, AnUnknownOneIsRefused) {
  Process worker("icecache-worker", {"generate", "--model", SourcePath("tests/models/recall"),
                                     "--prompt", "a", "--reply-mode", "pigeon"});
  EXPECT_NE(worker.Wait(20s).exit_code, 0);
  EXPECT_THAT(worker.Err(), HasSubstr("pigeon"));
}

}  // namespace
}  // namespace icecache::test
