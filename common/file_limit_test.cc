#include "common/file_limit.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

namespace icecache {
namespace {

class FileLimit : public ::testing::Test {
 protected:
  FileLimit() { ::getrlimit(RLIMIT_NOFILE, &before_); }
  ~FileLimit() override { ::setrlimit(RLIMIT_NOFILE, &before_); }
  void SetSoft(rlim_t soft) const {
    const rlimit limit{soft, before_.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  static int LowestFree() {
    const int fd = ::open("/dev/null", O_RDONLY);
    ::close(fd);
    return fd;
  }
  rlimit before_{};
};

TEST_F(FileLimit, IsRaisedToTheHardOne) {
  SetSoft(64);
  EXPECT_EQ(RaiseFileLimit(), before_.rlim_max);
  rlimit now{};
  ::getrlimit(RLIMIT_NOFILE, &now);
  EXPECT_EQ(now.rlim_cur, before_.rlim_max);
}

TEST_F(FileLimit, ShortageIsNamedWithItsRemedyAndLeavesNothingOpen) {
  const int free = LowestFree();
  SetSoft(static_cast<rlim_t>(free) + 5);
  EXPECT_TRUE(CheckFileDescriptors(5).ok());
  const Status status = CheckFileDescriptors(6);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(status.message(), ::testing::AllOf(::testing::HasSubstr("5 file descriptors"),
                                                 ::testing::HasSubstr("ulimit -n")));
  EXPECT_EQ(LowestFree(), free);
}

}  // namespace
}  // namespace icecache
