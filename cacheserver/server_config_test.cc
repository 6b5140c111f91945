#include "cacheserver/server_config.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/limits.h"

namespace icecache {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr Machine kMachine{.cores = 8,
                           .memory_available = 64ull << 30,
                           .cgroup_available = 32ull << 30,
                           .shm_available = 8ull << 30,
                           .memlock = 8ull << 20};

Result<ParsedServerConfig> Parse(std::vector<const char*> args,
                                 std::map<std::string, std::string> environment = {}) {
  args.insert(args.begin(), "icecache-server");
  return ParseServerConfig(static_cast<int>(args.size()), args.data(), kMachine,
                           [environment](const char* name) -> const char* {
                             auto it = environment.find(name);
                             return it == environment.end() ? nullptr : it->second.c_str();
                           });
}

TEST(ServerConfig, DefaultsFitTheMachine) {
  Result<ParsedServerConfig> parsed = Parse({});
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->config.memory_size, 4ull << 30);
  EXPECT_EQ(parsed->config.threads, 4u);
  EXPECT_EQ(parsed->config.port, 7400u);
  EXPECT_TRUE(CheckServerConfig(parsed->config, kMachine).ok());
  Machine small = kMachine;
  small.cores = 1;
  small.cgroup_available = 1ull << 30;
  ServerConfig config = DefaultServerConfig(small);
  EXPECT_EQ(config.memory_size, 512ull << 20);
  EXPECT_EQ(config.threads, 1u);
  EXPECT_TRUE(CheckServerConfig(config, small).ok());
}

TEST(ServerConfig, FlagsAndEnvironmentReachTheFields) {
  Result<ParsedServerConfig> parsed =
      Parse({"--memory-size", "2GiB", "--threads=2", "--lease-ms", "3s", "--log-format", "json"},
            {{"ICECACHE_PORT", "0"}, {"ICECACHE_THREADS", "7"}});
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->config.memory_size, 2ull << 30);
  EXPECT_EQ(parsed->config.threads, 2u);
  EXPECT_EQ(parsed->config.lease_ms, 3000u);
  EXPECT_EQ(parsed->config.port, 0u);
  EXPECT_EQ(parsed->config.format, LogFormat::kJson);
  EXPECT_THAT(parsed->merged, HasSubstr("threads = 2"));
}

TEST(ServerConfig, RefusesWrongValuesByName) {
  EXPECT_THAT(Parse({"--log-level", "loud"}).status().message(), HasSubstr("log"));
  EXPECT_THAT(Parse({"--transports", "posix,self"}).status().message(),
              HasSubstr("posix,self,tcp"));
  EXPECT_FALSE(Parse({"--port", "70000"}).ok());
  EXPECT_FALSE(Parse({"--threads", "0"}).ok());
  EXPECT_TRUE(Parse({"--transports", "rc,tcp"}).ok());
}

TEST(ServerConfig, HelpShowsExamples) {
  Result<ParsedServerConfig> parsed = Parse({"--help"});
  ASSERT_TRUE(parsed.ok());
  EXPECT_TRUE(parsed->outcome.exit);
  EXPECT_EQ(parsed->outcome.exit_code, 0);
  EXPECT_THAT(parsed->outcome.text,
              AllOf(HasSubstr("--memory-size"), HasSubstr("icecache-server --host 0.0.0.0")));
}

TEST(ServerConfig, LoopbackIsRecognised) {
  for (const char* host : {"127.0.0.1", "127.9.9.9", "::1", "localhost"})
    EXPECT_TRUE(IsLoopbackHost(host)) << host;
  for (const char* host : {"0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.org", ""}) {
    EXPECT_FALSE(IsLoopbackHost(host)) << host;
  }
}

TEST(ServerConfig, OpenAddressNeedsATokenFile) {
  ServerConfig config = DefaultServerConfig(kMachine);
  config.host = "0.0.0.0";
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("--token-file"));
  config.token_file = "tokens.toml";
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("--tls-cert"));
  config.allow_plaintext = true;
  EXPECT_TRUE(CheckServerConfig(config, kMachine).ok());
  config.allow_plaintext = false;
  config.tls_cert = "server.pem";
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("tls-key"));
  config.tls_key = "server.key";
  EXPECT_TRUE(CheckServerConfig(config, kMachine).ok());
  config = DefaultServerConfig(kMachine);
  config.http_host = "::";
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("--http-host"));
}

TEST(ServerConfig, MissingResourcesAreRefusedWithTheRemedy) {
  ServerConfig config = DefaultServerConfig(kMachine);
  config.memory_size = 100ull << 30;
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(),
              AllOf(HasSubstr("64GiB"), HasSubstr("--memory-size")));
  config.memory_size = 40ull << 30;
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(),
              AllOf(HasSubstr("32GiB"), HasSubstr("MemoryMax")));
  config.memory_size = limits::kPoolBytesMin;
  config.threads = 4;
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("--threads"));

  config = DefaultServerConfig(kMachine);
  Machine machine = kMachine;
  machine.shm_available = 1 << 20;
  EXPECT_THAT(CheckServerConfig(config, machine).message(), HasSubstr("--shm-size"));
  config.transports = "rc_mlx5,tcp";
  EXPECT_THAT(CheckServerConfig(config, kMachine).message(), HasSubstr("ulimit -l unlimited"));
  machine = kMachine;
  machine.memlock = ~0ull;
  EXPECT_TRUE(CheckServerConfig(config, machine).ok());
  machine.files = 100;
  EXPECT_THAT(CheckServerConfig(config, machine).message(), HasSubstr("ulimit -Hn"));
  machine.files = ~0ull;
  config.data_dir = "/proc/icecache";
  EXPECT_THAT(CheckServerConfig(config, machine).message(), HasSubstr("can write"));
  config.data_dir.clear();
  config.heartbeat_ms = config.lease_ms;
  EXPECT_THAT(CheckServerConfig(config, machine).message(), HasSubstr("lease-ms"));
}

TEST(ServerConfig, AddressThatUcxCannotServeIsRefused) {
  ServerConfig config = DefaultServerConfig(kMachine);
  Machine machine = kMachine;
  config.host = "127.0.0.2";
  EXPECT_TRUE(CheckServerConfig(config, machine).ok());  // unknown: not refused
  machine.first_addresses = {"127.0.0.1", "10.0.0.5"};
  EXPECT_THAT(CheckServerConfig(config, machine).message(),
              AllOf(HasSubstr("127.0.0.2"), HasSubstr("127.0.0.1, 10.0.0.5, or 0.0.0.0")));
  for (const char* host : {"127.0.0.1", "::1", "localhost"}) {
    config.host = host;
    EXPECT_TRUE(CheckServerConfig(config, machine).ok()) << host;
  }
  const std::vector<std::string> here = ReadMachine().first_addresses;
  EXPECT_THAT(here, testing::Contains("127.0.0.1"));
}

class MachineTest : public ::testing::Test {
 protected:
  std::string root_ = ::testing::TempDir() + "/machine-" + std::to_string(getpid());
  void Put(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
};

TEST_F(MachineTest, ReadsTheTightestControlGroup) {
  Put("/proc/meminfo", "MemTotal:  8 kB\nMemAvailable:    2048 kB\n");
  Put("/proc/self/cgroup", "0::/a/b\n");
  Put("/sys/fs/cgroup/a/b/memory.max", "max\n");
  Put("/sys/fs/cgroup/a/memory.max", "1000\n");
  Put("/sys/fs/cgroup/a/memory.current", "400\n");
  Machine machine = ReadMachine(root_);
  EXPECT_EQ(machine.memory_available, 2048u * 1024);
  EXPECT_EQ(machine.cgroup_available, 600u);
  EXPECT_GE(machine.cores, 1u);
}

TEST_F(MachineTest, ReadsVersionOneAndNoLimit) {
  Put("/proc/self/cgroup", "5:cpu:/x\n4:memory:/m\n");
  Put("/sys/fs/cgroup/memory/m/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(ReadMachine(root_).cgroup_available, ~0ull);
  Put("/sys/fs/cgroup/memory/m/memory.limit_in_bytes", "5000\n");
  Put("/sys/fs/cgroup/memory/m/memory.usage_in_bytes", "6000\n");
  EXPECT_EQ(ReadMachine(root_).cgroup_available, 0u);
  EXPECT_EQ(ReadMachine(root_ + "/nowhere").memory_available, ~0ull);
}

}  // namespace
}  // namespace icecache
