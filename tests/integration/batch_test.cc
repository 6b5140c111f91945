// `icecache-worker generate --requests` with real processes: sequences that decode together say
// what each of them says alone, as they join and leave, and one that fails leaves the others be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using nlohmann::json;
using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

struct Request {
  std::string id, question;
  uint32_t budget, count;
};

class BatchProcess : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(450)));
    Ran({"--prompt-file", dir_.path("prompt"), "--context", "doc", "--publish", "--max-new-tokens",
         "0"});
  }
  std::vector<std::string> Args(const std::vector<std::string>& more) const {
    std::vector<std::string> args = {
        "generate", "--model",         SourcePath("tests/models/recall"),
        "--server", server_.address(), "--device",
        "cpu",      "--transports",    GetParam()};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  std::string Ran(const std::vector<std::string>& more) const {
    Process worker("icecache-worker", Args(more));
    const ProcessResult r = worker.Wait(100s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    return worker.Out();
  }
  std::vector<std::string> Batch(const std::vector<Request>& requests, int batch) const {
    std::string lines;
    for (const Request& r : requests) {
      lines += json{{"id", r.id},
                    {"question", r.question},
                    {"budget", r.budget},
                    {"max_new_tokens", r.count}}
                   .dump() +
               "\n";
    }
    WriteFile(dir_.path("requests"), lines);
    return Args({"--fork-of", "doc", "--requests", dir_.path("requests"), "--batch",
                 std::to_string(batch)});
  }
  std::string Alone(const Request& r) const {
    const std::string out =
        Ran({"--fork-of", "doc", "--question", r.question, "--budget", std::to_string(r.budget),
             "--max-new-tokens", std::to_string(r.count)});
    return out.substr(0, out.size() - 1);  // its line's end
  }
  // The lines that end requests, by id; their pieces of text must add up to their answers.
  static std::map<std::string, json> Ends(const std::string& out) {
    std::map<std::string, json> ends;
    std::map<std::string, std::string> said;
    std::istringstream lines(out);
    for (std::string line; std::getline(lines, line);) {
      const json parsed = json::parse(line);
      const std::string id = parsed.at("id");
      if (parsed.contains("text")) {
        said[id] += parsed.at("text").get<std::string>();
      } else {
        EXPECT_EQ(parsed.value("answer", ""), said[id]);
        EXPECT_TRUE(ends.emplace(id, parsed).second) << id << " ended twice";
      }
    }
    return ends;
  }

  TempDir dir_;
  TestServer server_{{"--memory-size", "256MiB", "--threads", "2", "--transports", GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Transports, BatchProcess,
                         ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

TEST_P(BatchProcess, EachSaysWhatItSaysAloneAsTheyJoinAndLeave) {
  const std::vector<Request> requests = {
      {"fact", kFactQuestion, 64, 6},      {"prose", " you may copy and", 128, 20},
      {"all", kFactQuestion, 1000000, 12}, {"short", " the licensor", 48, 3},
      {"none", " the work", 96, 16},
  };
  std::map<std::string, std::string> alone;
  for (const Request& r : requests) alone[r.id] = Alone(r);
  EXPECT_THAT(alone["fact"], HasSubstr(kFactAnswer));
  for (const int batch : {1, 3, 5}) {
    Process worker("icecache-worker", Batch(requests, batch));
    const ProcessResult r = worker.Wait(100s);
    ASSERT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    const auto ends = Ends(worker.Out());
    ASSERT_EQ(ends.size(), requests.size());
    for (const Request& request : requests) {
      EXPECT_EQ(ends.at(request.id).at("answer"), alone[request.id]) << "batch " << batch;
    }
    EXPECT_EQ(worker.Err().find("caution"), std::string::npos) << worker.Err();
  }
  EXPECT_THAT(server_.HttpGet("/metrics"),
              HasSubstr("icecache_requests_total{kind=\"select_batch\",result=\"OK\"}"));
}

TEST_P(BatchProcess, ADroppedContextEndsItsSequenceAlone) {
  const Request endless{"endless", " you may copy and", 64, 1000000};
  const Request prose{"prose", " the licensor shall", 96, 400};
  const std::string alone = Alone(prose);
  std::vector<std::string> args = Batch({endless, prose}, 2);
  args.emplace_back("--ignore-eos");
  Process worker("icecache-worker", args);
  ASSERT_TRUE(worker.WaitForOutput("\"endless\"", 60s)) << worker.Err();
  Process ctl("icecachectl", {"drop", "doc-" + std::to_string(worker.pid()) + "-0", "--server",
                              server_.address()});
  const ProcessResult dropped = ctl.Wait(20s);
  ASSERT_TRUE(dropped.exited && dropped.exit_code == 0) << ctl.Err();
  const ProcessResult r = worker.Wait(100s);
  EXPECT_TRUE(r.exited && r.exit_code != 0);
  const auto ends = Ends(worker.Out());
  ASSERT_EQ(ends.size(), 2u) << worker.Out();
  EXPECT_EQ(ends.at("endless").at("end"), "error");
  EXPECT_THAT(worker.Err(), HasSubstr("request endless"));
  EXPECT_EQ(ends.at("prose").at("end"), "length");
  EXPECT_EQ(ends.at("prose").at("answer").get<std::string>().substr(0, alone.size()), alone);
}

TEST_P(BatchProcess, AKilledServerEndsAllRequestsWithAClearError) {
  std::vector<std::string> args =
      Batch({{"a", " the", 64, 1000000}, {"b", " the work", 64, 1000000}, {"c", " the", 64, 5}}, 2);
  args.emplace_back("--ignore-eos");
  Process worker("icecache-worker", args);
  ASSERT_TRUE(worker.WaitForOutput("\"b\"", 60s)) << worker.Err();
  server_.process().Signal(SIGKILL);
  const ProcessResult r = worker.Wait(15s);
  ASSERT_TRUE(r.exited) << "still running";
  EXPECT_NE(r.exit_code, 0);
  const auto ends = Ends(worker.Out());
  ASSERT_EQ(ends.size(), 3u) << worker.Out();
  for (const auto& [id, end] : ends) {
    EXPECT_EQ(end.at("end"), "error") << id;
    EXPECT_THAT(end.at("error").get<std::string>(), HasSubstr("UNAVAILABLE")) << id;
  }
}

TEST_P(BatchProcess, BadRequestsAreRefusedByLineAndField) {
  const auto refused = [&](const std::string& lines, const char* expected) {
    WriteFile(dir_.path("requests"), lines);
    Process worker("icecache-worker",
                   Args({"--fork-of", "doc", "--requests", dir_.path("requests")}));
    const ProcessResult r = worker.Wait(20s);
    EXPECT_TRUE(r.exited && r.exit_code != 0);
    EXPECT_THAT(worker.Err(), HasSubstr(expected));
  };
  refused("", "no request");
  refused("{\"question\": \"a\"}\nnot json\n", "line 2");
  refused("{\"question\": \"a\", \"budget\": -1}", "budget is -1");
  refused("{\"question\": \"a\", \"temperature\": \"hot\"}", "temperature");
  refused("{\"questoin\": \"a\"}", "unknown field 'questoin'");
  refused("{\"id\": \"x\", \"question\": \"a\"}\n{\"id\": \"x\", \"question\": \"b\"}", "line 2");
}

}  // namespace
}  // namespace icecache::test
