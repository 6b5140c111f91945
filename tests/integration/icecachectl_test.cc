// icecachectl as an operator uses it, against a real server with what a worker has left there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <nlohmann/json.hpp>

#include "cacheserver/context/tenant.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"

namespace icecache::test {
namespace {

using nlohmann::json;
using std::chrono_literals::operator""s;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int exit_code = -1;
  std::string out, err;
};

Ran Ctl(const std::string& server, std::vector<std::string> args) {
  args.insert(args.end(), {"--server", server, "--timeout-ms", "20s"});
  Process p("icecachectl", args);
  const ProcessResult r = p.Wait(60s);
  return {r.exited ? r.exit_code : -1, p.Out(), p.Err()};
}

void PublishDocument(const TestServer& server, const std::string& name,
                     std::vector<std::string> more = {}) {
  TempDir dir;
  std::string text = "<bos>";
  for (int i = 0; i < 400; ++i) text += " the harbour at night is quiet";
  WriteFile(dir.path("prompt"), text);
  std::vector<std::string> args = {
      "generate",         "--model",          SourcePath("tests/models/recall"),
      "--server",         server.address(),   "--prompt-file",
      dir.path("prompt"), "--context",        name,
      "--publish",        "--max-new-tokens", "0"};
  args.insert(args.end(), more.begin(), more.end());
  Process worker("icecache-worker", args);
  const ProcessResult r = worker.Wait(100s);
  ASSERT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
}

TEST(Icecachectl, HelpShowsCommandsAndExamples) {
  Process help("icecachectl", {"--help"});
  EXPECT_EQ(help.Wait(20s).exit_code, 0);
  for (const char* word : {"contexts", "tenants", "leases", "memory", "explain", "drop", "publish",
                           "fork", "drain", "verify", "bench", "--json", "icecachectl explain"}) {
    EXPECT_THAT(help.Out(), HasSubstr(word));
  }
  Process explain("icecachectl", {"explain", "--help"});
  EXPECT_EQ(explain.Wait(20s).exit_code, 0);
  EXPECT_THAT(explain.Out(), HasSubstr("icecachectl explain report-2025"));
}

TEST(Icecachectl, WithoutAServerItSaysSoWithItsExitCode) {
  const Ran ran = Ctl("127.0.0.1:1", {"contexts"});
  EXPECT_EQ(ran.exit_code, 9);
  EXPECT_THAT(ran.err, HasSubstr("127.0.0.1:1"));
  EXPECT_NE(Ctl("127.0.0.1:1", {}).exit_code, 0);
}

TEST(Icecachectl, ATourOfOneContext) {
  TestServer server({"--memory-size", "256MiB", "--threads", "2"});
  const std::string at = server.address();
  PublishDocument(server, "doc");
  EXPECT_THAT(Ctl(at, {"contexts"}).out,
              AllOf(HasSubstr("NAME"), HasSubstr("doc"), HasSubstr("published")));
  const json contexts = json::parse(Ctl(at, {"contexts", "--json"}).out);
  ASSERT_EQ(contexts["contexts"].size(), 1u);
  const auto tokens = contexts["contexts"][0]["tokens"].get<uint64_t>();
  EXPECT_GT(tokens, 1000u);

  const Ran verified = Ctl(at, {"verify", "doc"});
  EXPECT_EQ(verified.exit_code, 0) << verified.err;
  EXPECT_THAT(verified.out, HasSubstr("0 slices damaged"));
  EXPECT_GT(json::parse(Ctl(at, {"verify", "--json"}).out)["pages"].get<uint64_t>(), 0u);
  EXPECT_EQ(Ctl(at, {"verify", "nix"}).exit_code, 2);

  // A second name for the same content: nothing is copied, and it outlives the first.
  const double used = server.StatusNumber("/memory/used_bytes");
  ASSERT_EQ(Ctl(at, {"fork", "doc", "copy"}).exit_code, 0);
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"), used);
  EXPECT_EQ(Ctl(at, {"fork", "doc", "copy"}).exit_code, 3) << "the name is taken";
  ASSERT_EQ(Ctl(at, {"drop", "doc"}).exit_code, 0);
  EXPECT_EQ(Ctl(at, {"drop", "doc"}).exit_code, 2);
  const json rest = json::parse(Ctl(at, {"contexts", "--json"}).out);
  ASSERT_EQ(rest["contexts"].size(), 1u);
  EXPECT_EQ(rest["contexts"][0]["name"], "copy");
  EXPECT_EQ(rest["contexts"][0]["tokens"].get<uint64_t>(), tokens);
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"), used);

  const Ran gone = Ctl(at, {"explain", "doc"});
  EXPECT_EQ(gone.exit_code, 2);
  EXPECT_THAT(gone.out, HasSubstr("it was dropped"));
  EXPECT_THAT(Ctl(at, {"explain", "nix"}).out, HasSubstr("is the name right"));
  const Ran there = Ctl(at, {"explain", "copy"});
  EXPECT_EQ(there.exit_code, 0);
  EXPECT_THAT(there.out,
              AllOf(HasSubstr("published"), HasSubstr("in memory"), HasSubstr("SEGMENT")));

  EXPECT_THAT(Ctl(at, {"tenants"}).out, HasSubstr("default"));
  EXPECT_THAT(Ctl(at, {"memory"}).out, AllOf(HasSubstr("SHARD"), HasSubstr("TENANT")));
  EXPECT_EQ(json::parse(Ctl(at, {"leases", "--json"}).out)["leases"].size(), 0u);

  EXPECT_EQ(Ctl(at, {"drain"}).exit_code, 0);
  const ProcessResult end = server.process().Wait(20s);
  EXPECT_TRUE(end.exited && end.exit_code == 0) << server.process().Err();
}

TEST(Icecachectl, ForksOfACopyGoOnFromTheWholeContext) {
  TestServer server({"--memory-size", "256MiB", "--threads", "2"});
  PublishDocument(server, "doc");
  ASSERT_EQ(Ctl(server.address(), {"fork", "doc", "copy"}).exit_code, 0);
  const auto answer = [&](const std::string& parent) {
    Process worker("icecache-worker",
                   {"generate", "--model", SourcePath("tests/models/recall"), "--server",
                    server.address(), "--fork-of", parent, "--question", "the harbour",
                    "--max-new-tokens", "8", "--budget", "1000000"});
    const ProcessResult r = worker.Wait(100s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    return worker.Out();
  };
  EXPECT_EQ(answer("copy"), answer("doc"));
}

TEST(Icecachectl, SixteenForksHoldTheDocumentOnce) {
  TestServer server({"--memory-size", "256MiB", "--threads", "2"});
  const std::string at = server.address();
  PublishDocument(server, "doc");
  const double one = server.StatusNumber("/memory/used_bytes");
  ASSERT_GT(one, 0);
  for (int i = 0; i < 16; ++i) {
    ASSERT_EQ(Ctl(at, {"fork", "doc", "copy-" + std::to_string(i)}).exit_code, 0);
  }
  EXPECT_LE(server.StatusNumber("/memory/used_bytes"), 1.02 * one);
  const json contexts = json::parse(Ctl(at, {"contexts", "--json"}).out)["contexts"];
  ASSERT_EQ(contexts.size(), 17u);
  for (const json& context : contexts) EXPECT_EQ(context["tokens"], contexts[0]["tokens"]);
  // The document stays as long as one of them does.
  EXPECT_EQ(Ctl(at, {"drop", "doc"}).exit_code, 0);
  for (int i = 0; i < 15; ++i) EXPECT_EQ(Ctl(at, {"drop", "copy-" + std::to_string(i)}).exit_code, 0);
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"), one);
  EXPECT_EQ(Ctl(at, {"verify", "copy-15"}).exit_code, 0);
  EXPECT_EQ(Ctl(at, {"drop", "copy-15"}).exit_code, 0);
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"), 0);
}

TEST(Icecachectl, BenchSmokeComparesWhatItGets) {
  TestServer server({"--memory-size", "256MiB", "--threads", "2"});
  const Ran ran = Ctl(server.address(), {"bench", "smoke", "--json", "--tokens", "1024"});
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json result = json::parse(ran.out);
  EXPECT_GT(result["pages_compared"].get<uint64_t>(), 1000u);
  EXPECT_GE(result["select_p99_us"].get<double>(), result["select_p50_us"].get<double>());
  EXPECT_EQ(server.StatusNumber("/memory/used_bytes"), 0);
}

TEST(Icecachectl, TenantsAreAskedForTheirSecretAndSeeTheirOwn) {
  TempDir dir;
  WriteFile(dir.path("tokens.toml"),
            TenantEntry("alice", "alice-secret") + TenantEntry("bob", "bob-secret"));
  TestServer server(
      {"--memory-size", "256MiB", "--threads", "1", "--token-file", dir.path("tokens.toml")});
  PublishDocument(server, "doc", {"--tenant", "alice", "--secret", "alice-secret"});
  const auto as = [&](const std::string& tenant, std::vector<std::string> args) {
    args.insert(args.end(), {"--tenant", tenant, "--secret", tenant + "-secret"});
    return Ctl(server.address(), std::move(args));
  };
  EXPECT_EQ(Ctl(server.address(), {"contexts", "--tenant", "alice", "--secret", "x"}).exit_code, 5);
  EXPECT_THAT(as("alice", {"contexts"}).out, HasSubstr("doc"));
  EXPECT_THAT(as("bob", {"contexts"}).out, Not(HasSubstr("doc")));
  for (const char* command : {"explain", "drop", "publish", "verify"})
    EXPECT_EQ(as("bob", {command, "doc"}).exit_code, 2) << command;
  EXPECT_EQ(as("bob", {"drain"}).exit_code, 4);
  EXPECT_THAT(as("alice", {"contexts"}).out, HasSubstr("doc"));
}

}  // namespace
}  // namespace icecache::test
