// icecache-server as its users start and stop it: flags, refusals, signals, admin pages.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <nlohmann/json.hpp>

#include "cacheserver/context/tenant.h"
#include "common/control_client.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

struct Finished {
  int exit_code;
  std::string out, err;
};

Finished RunServer(const std::vector<std::string>& args,
                   const std::vector<std::string>& environment = {}) {
  Process p("icecache-server", args, environment);
  const ProcessResult r = p.Wait(20s);
  return {r.exited ? r.exit_code : -1, p.Out(), p.Err()};
}

TEST(ServerProcess, HelpAndVersionExplainTheProgram) {
  const Finished help = RunServer({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* flag :
       {"--config", "--host", "--port", "--http-host", "--http-port", "--memory-size", "--data-dir",
        "--threads", "--log-level", "--log-format", "--print-config", "--check-config"}) {
    EXPECT_THAT(help.out, HasSubstr(flag));
  }
  EXPECT_THAT(help.out, HasSubstr("icecache-server --"));  // an example
  const Finished version = RunServer({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, HasSubstr("icecache"));
}

TEST(ServerProcess, FlagBeatsEnvironmentBeatsFile) {
  TempDir dir;
  WriteFile(dir.path("server.toml"),
            "memory_size = \"64MiB\"\nthreads = 1\nlog_level = \"warn\"\n");
  const Finished p =
      RunServer({"--config", dir.path("server.toml"), "--memory-size", "128MiB", "--print-config"},
                {"ICECACHE_MEMORY_SIZE=96MiB", "ICECACHE_THREADS=2"});
  EXPECT_EQ(p.exit_code, 0) << p.err;
  EXPECT_THAT(p.out, HasSubstr("memory_size = \"128MiB\""));
  EXPECT_THAT(p.out, HasSubstr("threads = 2"));
  EXPECT_THAT(p.out, HasSubstr("log_level = \"warn\""));
}

TEST(ServerProcess, BadSettingsAreRefusedByName) {
  const Finished unknown = RunServer({"--memory-sise", "1GiB"});
  EXPECT_NE(unknown.exit_code, 0);
  EXPECT_THAT(unknown.err, HasSubstr("memory-sise"));
  const Finished size = RunServer({"--memory-size", "much", "--check-config"});
  EXPECT_NE(size.exit_code, 0);
  EXPECT_THAT(size.err, HasSubstr("much"));
  EXPECT_THAT(size.err, HasSubstr("4GiB"));  // how to write one
  TempDir dir;
  WriteFile(dir.path("bad.toml"), "port = \"seven\"\n");
  const Finished file = RunServer({"--config", dir.path("bad.toml"), "--check-config"});
  EXPECT_NE(file.exit_code, 0);
  EXPECT_THAT(file.err, HasSubstr("bad.toml"));
  EXPECT_THAT(file.err, HasSubstr("port"));
}

TEST(ServerProcess, NonLoopbackWithoutTokensIsRefusedWithTheRemedy) {
  const Finished p =
      RunServer({"--host", "0.0.0.0", "--port", "0", "--http-port", "0", "--memory-size", "64MiB"});
  EXPECT_NE(p.exit_code, 0);
  EXPECT_THAT(p.err, HasSubstr("--token-file"));
}

TEST(ServerProcess, MoreMemoryThanThereIsIsRefusedWithTheRemedy) {
  const Finished p = RunServer({"--port", "0", "--http-port", "0", "--memory-size", "900TiB"});
  EXPECT_NE(p.exit_code, 0);
  EXPECT_THAT(p.err, HasSubstr("--memory-size"));
}

TEST(ServerProcess, TakenPortIsRefusedWithTheRemedy) {
  TestServer first({"--memory-size", "64MiB", "--threads", "1"});
  const Finished p = RunServer(
      {"--port", std::to_string(first.port()), "--http-port", "0", "--memory-size", "64MiB"});
  EXPECT_NE(p.exit_code, 0);
  EXPECT_THAT(p.err, HasSubstr(std::to_string(first.port())));
  EXPECT_THAT(p.err, HasSubstr("--port"));
}

TEST(ServerProcess, SaysWhichTransportsItChose) {
  TestServer server({"--memory-size", "64MiB", "--threads", "1"});
  EXPECT_TRUE(server.process().WaitForOutput("posix", 10s)) << server.process().Err();
}

TEST(ServerProcess, AdminPagesAnswer) {
  TestServer server({"--memory-size", "64MiB", "--threads", "1"});
  EXPECT_THAT(server.HttpGet("/metrics"), HasSubstr("# TYPE icecache_"));
  EXPECT_TRUE(nlohmann::json::accept(server.HttpGet("/status")));
  EXPECT_THAT(server.HttpGet("/version"), HasSubstr("version"));
  EXPECT_THAT(server.HttpGet("/config"), HasSubstr("memory_size"));
  EXPECT_FALSE(server.HttpGet("/live").empty());
  EXPECT_FALSE(server.HttpGet("/ready").empty());
}

TEST(ServerProcess, PromtoolAcceptsTheMetrics) {
  Process there("/bin/sh", {"-c", "command -v promtool"});
  if (there.Wait(10s).exit_code != 0)
    GTEST_SKIP() << "promtool is not installed (Debian package prometheus): not checked";
  TempDir dir;
  TestServer server({"--memory-size", "64MiB", "--threads", "2", "--data-dir", dir.path("data")});
  Process smoke("icecachectl", {"bench", "smoke", "--server", server.address()});
  const ProcessResult served = smoke.Wait(60s);
  ASSERT_TRUE(served.exited && served.exit_code == 0) << smoke.Err();
  const std::string metrics = server.HttpGet("/metrics");
  for (const char* name : {"icecache_checksum_failures_total",
                           "icecache_select_seconds_bucket{stage=\"append\"",
                           "icecache_select_seconds_bucket{stage=\"select\"",
                           "icecache_select_seconds_bucket{stage=\"gather\"",
                           "icecache_pages{shard=\"0\",tier=\"memory\"}",
                           "icecache_pages{shard=\"0\",tier=\"disk\"}",
                           "icecache_received_bytes_total{transport=",
                           "icecache_sent_bytes_total{transport=",
                           "icecache_selections_total{found=\"memory\"}",
                           "icecache_selections_total{found=\"disk\"}",
                           "icecache_pages_resident_total",
                           "icecache_leases",
                           "icecache_pages_evicted_total{reason=\"memory\"}",
                           "icecache_pages_evicted_total{reason=\"quota\"}",
                           "icecache_pages_evicted_total{reason=\"watermark\"}",
                           "icecache_quota_refusals_total{tenant=\"default\"}",
                           "icecache_memory_refusals_total{tenant=\"default\"}",
                           "icecache_loop_lag_seconds_bucket{loop=\"control\"",
                           "icecache_cold_store_stalls_total",
                           "icecache_cold_store_background_errors_total",
                           "icecache_cold_store_disk_bytes",
                           "icecache_promotion_seconds_bucket"}) {
    EXPECT_THAT(metrics, HasSubstr(name));
  }
  WriteFile(dir.path("metrics"), metrics);
  Process check("/bin/sh", {"-c", "promtool check metrics < " + dir.path("metrics")});
  const ProcessResult r = check.Wait(30s);
  EXPECT_TRUE(r.exited && r.exit_code == 0) << check.Out() << check.Err();
}

// Tenants come and go with SIGHUP; a file that is broken changes nothing and is named.
TEST(ServerProcess, AHangUpReadsTheTokenFileAgain) {
  const auto tenant = [](const std::string& name) { return TenantEntry(name, name + "-secret"); };
  TempDir dir;
  const std::string tokens = dir.path("tokens.toml");
  WriteFile(tokens, tenant("alice"));
  TestServer server({"--memory-size", "64MiB", "--threads", "1", "--token-file", tokens});
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration::zero());
  const auto connect = [&](const std::string& name) {
    ControlClientOptions options;
    options.address = server.address();
    options.tenant = name;
    options.secret = name + "-secret";
    return ControlClient::Connect(reactor, options);
  };
  auto alice = connect("alice");
  ASSERT_TRUE(alice.ok()) << alice.status().ToString();
  EXPECT_FALSE(connect("bob").ok());

  WriteFile(tokens, tenant("bob") + "[[tenant]]\nname = 7\n");
  server.process().Signal(SIGHUP);
  ASSERT_TRUE(server.process().WaitForOutput("the old one stays", 10s)) << server.process().Err();
  EXPECT_THAT(server.process().Err(), HasSubstr("tokens.toml"));
  EXPECT_TRUE((*alice)->List().ok());
  EXPECT_FALSE(connect("bob").ok());

  WriteFile(tokens, tenant("bob"));
  server.process().Signal(SIGHUP);
  ASSERT_TRUE(server.process().WaitForOutput("token file reloaded", 10s)) << server.process().Err();
  EXPECT_TRUE(connect("bob").ok());
  EXPECT_FALSE(connect("alice").ok());
  EXPECT_FALSE((*alice)->List().ok()) << "her connection was closed";
}

TEST(ServerProcess, TermDrainsAndExitsZero) {
  TestServer server({"--memory-size", "64MiB", "--threads", "2"});
  server.process().Signal(SIGTERM);
  const ProcessResult r = server.process().Wait(20s);
  EXPECT_TRUE(r.exited) << "signal " << r.signal << "\n" << server.process().Err();
  EXPECT_EQ(r.exit_code, 0) << server.process().Err();
}

TEST(ServerProcess, TermEndsAtTheDrainTimeoutWhateverIsStillHeld) {
  TestServer server({"--memory-size", "64MiB", "--drain-timeout-ms", "300"});
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  const auto client = ControlClient::Connect(reactor, {.address = server.address()}).value();
  wire::Create create;
  create.shape = {.layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = 64};
  create.policy = "exact";
  ASSERT_TRUE(client->Create(create).ok());
  server.process().Signal(SIGTERM);
  const ProcessResult r = server.process().Wait(20s);
  EXPECT_EQ(r.exit_code, 0) << server.process().Err();
  EXPECT_THAT(server.process().Err(), HasSubstr("drain timed out"));
}

TEST(ServerProcess, IdleCostsUnderOnePercentOfACore) {
  TestServer server({"--memory-size", "64MiB", "--threads", "1"});
  std::this_thread::sleep_for(1s);
  const double before = server.process().CpuSeconds();
  std::this_thread::sleep_for(3s);
  EXPECT_LE(server.process().CpuSeconds() - before, 0.03 + 0.01);  // 1 % of 3 s, and one clock tick
}

}  // namespace
}  // namespace icecache::test
