// A server and a worker on two hosts: two network namespaces, joined by a veth pair. Pages come
// over TCP, since nothing else reaches across; a cable that is pulled is noticed by its silence at
// both ends.
//
// Network namespaces of one machine count as one host to UCX, which would then choose shared
// memory; its wake-ups do not cross. So both sides are told to use TCP alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "cacheserver/context/tenant.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

constexpr char kServerIp[] = "10.213.7.1", kWorkerIp[] = "10.213.7.2";

class TwoHosts : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string a = server_host_, b = worker_host_, id = std::to_string(::getpid());
    const std::string ethernet_a = "ica" + id, ethernet_b = "icb" + id;
    for (const std::string& step :
         {"ip netns add " + a, "ip netns add " + b,
          "ip link add " + ethernet_a + " type veth peer name " + ethernet_b,
          "ip link set " + ethernet_a + " netns " + a + " name cable",
          "ip link set " + ethernet_b + " netns " + b + " name cable",
          "ip -n " + a + " addr add " + kServerIp + "/24 dev cable",
          "ip -n " + b + " addr add " + kWorkerIp + "/24 dev cable",
          "ip -n " + a + " link set lo up", "ip -n " + b + " link set lo up",
          "ip -n " + a + " link set cable up", "ip -n " + b + " link set cable up"}) {
      Process p("/bin/sh", {"-c", step});
      if (p.Wait(20s).exit_code == 0) continue;
      GTEST_SKIP() << "not tested: network namespaces are not permitted here ('" << step
                   << "': " << p.Err() << "); needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN";
    }
    WriteFile(dir_.path("tokens.toml"), TenantEntry("t", "secret"));
    WriteFile(dir_.path("prompt"), FactPrompt(EnglishText(400)));
    StartServer();
  }
  void TearDown() override {
    server_.reset();
    for (const std::string& host : {server_host_, worker_host_}) {
      Process p("/bin/sh", {"-c", "ip netns del " + host + " 2>/dev/null"});
      p.Wait(20s);
    }
  }

  // `args[0]`: one of our programs.
  static std::unique_ptr<Process> On(const std::string& host, std::vector<std::string> args) {
    args[0] = std::string(std::getenv("ICECACHE_BIN_DIR")) + "/" + args[0];
    args.insert(args.begin(), {"ip", "netns", "exec", host});
    return std::make_unique<Process>("/usr/bin/env", args);
  }
  void StartServer() {
    server_ = On(server_host_, {"icecache-server",
                                "--host",
                                kServerIp,
                                "--port",
                                "0",
                                "--http-port",
                                "0",
                                "--port-file",
                                dir_.path("ports.json"),
                                "--memory-size",
                                "256MiB",
                                "--threads",
                                "2",
                                "--token-file",
                                dir_.path("tokens.toml"),
                                "--allow-plaintext",
                                "--transports",
                                "tcp,self",
                                "--lease-ms",
                                "5000"});
    ASSERT_TRUE(server_->WaitForOutput("ready", 30s)) << server_->Err();
    const auto ports = nlohmann::json::parse(ReadFile(dir_.path("ports.json")));
    address_ = std::string(kServerIp) + ":" + std::to_string(ports.at("port").get<int>());
  }
  std::unique_ptr<Process> Generate(std::vector<std::string> more) const {
    std::vector<std::string> args = {"icecache-worker", "generate",
                                     "--model",         SourcePath("tests/models/recall"),
                                     "--server",        address_,
                                     "--tenant",        "t",
                                     "--secret",        "secret",
                                     "--transports",    "tcp,self",
                                     "--device",        "cpu",
                                     "--log-level",     "info",
                                     "--prompt-file",   dir_.path("prompt")};
    args.insert(args.end(), more.begin(), more.end());
    return On(worker_host_, args);
  }
  void SetCable(const char* state) const {
    Process p("/bin/sh", {"-c", "ip -n " + worker_host_ + " link set cable " + state});
    ASSERT_EQ(p.Wait(20s).exit_code, 0) << p.Err();
  }
  // What the server accounts for, asked on its own host.
  double HeldBytes() const {
    const auto ctl = On(server_host_, {"icecachectl", "tenants", "--json", "--server", address_,
                                       "--tenant", "t", "--secret", "secret"});
    EXPECT_EQ(ctl->Wait(20s).exit_code, 0) << ctl->Err();
    return nlohmann::json::parse(ctl->Out()).at("tenants").at(0).at("held_bytes").get<double>();
  }

  const std::string server_host_ = "icecache-a" + std::to_string(::getpid());
  const std::string worker_host_ = "icecache-b" + std::to_string(::getpid());
  TempDir dir_;
  std::unique_ptr<Process> server_;
  std::string address_;
};

TEST_F(TwoHosts, AnswerAsOneDoesAndPagesAreSent) {
  const std::vector<std::string> ask = {"--question", kFactQuestion, "--max-new-tokens", "24"};
  std::vector<std::string> full = ask, served = ask;
  full.insert(full.end(), {"--method", "full_kv"});
  served.insert(served.end(), {"--budget", "1000000"});
  const auto alone = Generate(full), across = Generate(served);
  ASSERT_EQ(alone->Wait(100s).exit_code, 0) << alone->Err();
  ASSERT_EQ(across->Wait(100s).exit_code, 0) << across->Err();
  EXPECT_THAT(across->Out(), HasSubstr(kFactAnswer));
  EXPECT_EQ(across->Out(), alone->Out());
  EXPECT_THAT(across->Err(), HasSubstr("inline"));
  EXPECT_THAT(across->Err(), HasSubstr("cannot be mapped here"));
}

TEST_F(TwoHosts, APulledCableIsNoticedAtBothEnds) {
  const auto worker = Generate({"--max-new-tokens", "1000000", "--ignore-eos", "--budget", "64"});
  ASSERT_TRUE(worker->WaitForOutput(" the ", 60s)) << worker->Err();
  ASSERT_GT(HeldBytes(), 0);
  SetCable("down");
  EXPECT_TRUE(worker->WaitForOutput("no sign of life", 20s)) << worker->Err();
  const ProcessResult r = worker->Wait(30s);
  ASSERT_TRUE(r.exited) << "still running";
  EXPECT_NE(r.exit_code, 0);
  EXPECT_THAT(worker->Err(), HasSubstr("UNAVAILABLE"));
  const auto end = std::chrono::steady_clock::now() + 30s;
  while (HeldBytes() > 0 && std::chrono::steady_clock::now() < end) {
  }
  EXPECT_EQ(HeldBytes(), 0) << "its lease has ended";
}

TEST_F(TwoHosts, ACableThatIsPluggedInAgainIsUsedAgain) {
  const auto worker = Generate({"--max-new-tokens", "1500", "--ignore-eos", "--budget", "64"});
  ASSERT_TRUE(worker->WaitForOutput(" the ", 60s)) << worker->Err();
  SetCable("down");
  ASSERT_TRUE(worker->WaitForOutput("data connection lost", 20s)) << worker->Err();
  SetCable("up");
  EXPECT_TRUE(worker->WaitForOutput("data connection is back", 20s)) << worker->Err();
  EXPECT_EQ(worker->Wait(100s).exit_code, 0) << worker->Err();
}

}  // namespace
}  // namespace icecache::test
