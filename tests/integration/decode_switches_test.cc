// The switches that trade accuracy for time, with real processes over shared memory and TCP: off,
// or told to trust nothing, they change no token; on, the facts are still found.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

class DecodeSwitches : public ::testing::TestWithParam<const char*> {
 protected:
  std::vector<std::string> Worker(const std::string& command,
                                  const std::vector<std::string>& more) const {
    std::vector<std::string> args = {
        command,        "--model",         SourcePath("tests/models/recall"),
        "--server",     server_.address(), "--transports",
        GetParam(),     "--budget",        "96",
        "--reply-mode", "inline"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  std::string Generate(const std::vector<std::string>& switches, std::string* err) const {
    std::vector<std::string> args = Worker("generate", switches);
    for (const char* arg :
         {"--fork-of", "doc", "--question", kFactQuestion, "--max-new-tokens", "24"}) {
      args.emplace_back(arg);
    }
    Process worker("icecache-worker", args);
    const ProcessResult r = worker.Wait(100s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    *err = worker.Err();
    return worker.Out();
  }
  void Publish() const {
    WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(450)));
    Process worker("icecache-worker",
                   Worker("generate", {"--prompt-file", dir_.path("prompt"), "--context", "doc",
                                       "--publish", "--max-new-tokens", "0"}));
    const ProcessResult r = worker.Wait(100s);
    ASSERT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
  }
  TempDir dir_;
  TestServer server_{{"--memory-size", "256MiB", "--threads", "2", "--transports", GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Transports, DecodeSwitches,
                         ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

TEST_P(DecodeSwitches, OffOrTrustingNothingTheyChangeNoToken) {
  Publish();
  std::string err;
  const std::string plain = Generate({}, &err);
  EXPECT_THAT(plain, HasSubstr(kFactAnswer));
  EXPECT_EQ(Generate({"--no-prefetch", "--layer-reuse", "1", "--transfer", "native"}, &err), plain);
  EXPECT_EQ(err.find("int8"), std::string::npos);
  EXPECT_EQ(err.find("prefetch"), std::string::npos);
  // Only the very same queries are alike enough: everything is asked again.
  EXPECT_EQ(Generate({"--prefetch", "--prefetch-cosine", "1"}, &err), plain);
  EXPECT_THAT(err, HasSubstr("100.0 % of heads were asked again"));
  EXPECT_EQ(err.find("caution"), std::string::npos) << err;
}

TEST_P(DecodeSwitches, OnTheyStillFindTheFacts) {
  const auto recall = [this](const std::vector<std::string>& switches) {
    std::vector<std::string> args = switches;
    for (const char* arg :
         {"--tokens", "1500", "--facts", "16", "--question-count", "12", "--methods", "icecache"}) {
      args.emplace_back(arg);
    }
    Process worker("icecache-worker", Worker("recall", args));
    const ProcessResult r = worker.Wait(200s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    const auto report = nlohmann::json::parse(worker.Out(), nullptr, false);
    EXPECT_FALSE(report.is_discarded()) << worker.Out();
    const auto& method = report.at("methods").at(0);
    EXPECT_EQ(method.at("degraded_steps"), 0) << worker.Out();
    return method.at("accuracy").get<double>();
  };
  const double plain = recall({});
  EXPECT_GT(plain, 0.8);
  for (const std::vector<std::string>& switches :
       {std::vector<std::string>{"--transfer", "int8"},
        {"--prefetch"},
        {"--layer-reuse", "2"},
        {"--prefetch", "--layer-reuse", "2", "--transfer", "int8"}}) {
    EXPECT_GE(recall(switches), plain - 0.1) << switches.front();
  }
}

}  // namespace
}  // namespace icecache::test
