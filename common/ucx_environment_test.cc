#include "common/ucx_environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <set>

namespace icecache {
namespace {

TEST(UcxEnvironment, EverySettingHasANameAndAReason) {
  std::set<std::string> names;
  for (const UcxSetting& setting : UcxSettings()) {
    EXPECT_THAT(setting.name, testing::StartsWith("UCX_"));
    EXPECT_GT(std::string(setting.reason).size(), 10u) << setting.name;
    EXPECT_TRUE(names.insert(setting.name).second) << setting.name;
  }
  EXPECT_TRUE(names.contains("UCX_POSIX_ERROR_HANDLING"));
  EXPECT_TRUE(names.contains("UCX_MEM_EVENTS"));
}

// One test, because it can be applied once per process.
TEST(UcxEnvironment, AppliesWhatTheUserHasNotSetAndKeepsWhatHeHas) {
  ::unsetenv("UCX_TLS");
  ::setenv("UCX_TCP_TX_SEG_SIZE", "16K", 1);
  ApplyUcxEnvironment();
  EXPECT_STREQ(std::getenv("UCX_TLS"), "posix,cma,tcp,self");
  EXPECT_STREQ(std::getenv("UCX_TCP_TX_SEG_SIZE"), "16K");
  struct sigaction action {};
  ASSERT_EQ(::sigaction(SIGHUP, nullptr, &action), 0);
  EXPECT_EQ(action.sa_handler, SIG_DFL) << "HUP still belongs to UCX";
  ::setenv("UCX_TLS", "tcp", 1);
  ApplyUcxEnvironment();  // once
  EXPECT_STREQ(std::getenv("UCX_TLS"), "tcp");
}

TEST(UcxEnvironment, SharedMemoryCheckNamesTheRemedy) {
  EXPECT_TRUE(CheckSharedMemory(1).ok());
  const Status huge = CheckSharedMemory(uint64_t{1} << 60);
  EXPECT_EQ(huge.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(huge.message(), testing::HasSubstr("--shm-size"));
  EXPECT_THAT(huge.message(), testing::HasSubstr("/dev/shm"));
  const Status missing = CheckSharedMemory(1, "/no/such/directory");
  EXPECT_EQ(missing.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(missing.message(), testing::HasSubstr("UCX_TLS=tcp,self"));
}

TEST(UcxEnvironment, RecognisesSharedMemoryInTheTransportList) {
  for (const char* list : {"posix,tcp", "tcp,sysv", "all", "shm", "sm,self", "^cma", "mm"}) {
    EXPECT_TRUE(UsesSharedMemory(list)) << list;
  }
  for (const char* list : {"tcp,self", "rc,tcp,self", "", "tcp"}) {
    EXPECT_FALSE(UsesSharedMemory(list)) << list;
  }
}

TEST(UcxEnvironment, LanesAreReadFromTheEndpointInformation) {
  EXPECT_EQ(
      UcxLanes("# UCP endpoint \n"
               "#                 lane[0]:  2:posix/memory.0 md[1]  -> md[1]/posix am am_bw#0\n"
               "#                 lane[1]:  5:tcp/lo.0 md[2] -> md[2]/tcp rma_bw#0\n"
               "#                 lane[2]:  6:tcp/eth0.0 md[2] -> md[2]/tcp rma_bw#1\n"
               "#                 lane[3]:  6:tcp/eth0.1 md[2] -> md[2]/tcp rma_bw#2\n"
               "#                 am_send: 0..<egr/short>..227\n"),
      "posix/memory,tcp/lo,tcp/eth0 (shared memory)");
  EXPECT_EQ(UcxLanes("# lane[0]: 1:tcp/lo.0 md[0]\n"), "tcp/lo");
  EXPECT_EQ(UcxLanes("# lane[0]: <none>\n# lane[1]"), "");
  EXPECT_EQ(UcxLanes(""), "");
}

}  // namespace
}  // namespace icecache
