#include "common/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

namespace icecache {
namespace {

using Access = SharedMemory::Access;

TEST(SharedMemory, WhatOneWritesTheOtherReads) {
  const SharedMemory made = SharedMemory::Make(10000).value();
  ASSERT_EQ(made.bytes().size(), 10000u);
  const SharedMemory read = SharedMemory::Open(made.name(), Access::kRead).value();
  const SharedMemory written = SharedMemory::Open(made.name(), Access::kWrite).value();
  ASSERT_EQ(read.bytes().size(), 10000u);
  EXPECT_EQ(read.bytes()[9999], std::byte{0});
  made.bytes()[9999] = std::byte{3};
  written.bytes()[0] = std::byte{4};
  EXPECT_EQ(read.bytes()[9999], std::byte{3});
  EXPECT_EQ(read.bytes()[0], std::byte{4});
}

TEST(SharedMemory, WhatIsOpenOutlivesItsMakerAndIsNotFoundAnyMore) {
  SharedMemory made = SharedMemory::Make(64).value();
  const SharedMemoryName name = made.name();
  const SharedMemory open = SharedMemory::Open(name, Access::kRead).value();
  std::memset(made.bytes().data(), 7, 64);
  made = {};
  EXPECT_EQ(open.bytes()[63], std::byte{7});
  EXPECT_FALSE(SharedMemory::Open(name, Access::kRead).ok());
}

TEST(SharedMemory, AForgedNameOpensNothing) {
  const SharedMemory made = SharedMemory::Make(4096).value();
  const SharedMemory other = SharedMemory::Make(4096).value();
  SharedMemoryName guessed = made.name();
  guessed.nonce[1] ^= 1;
  SharedMemoryName swapped = made.name();
  swapped.descriptor = other.name().descriptor;
  SharedMemoryName longer = made.name();
  longer.bytes = 8192;
  SharedMemoryName empty = made.name();
  empty.bytes = 0;
  SharedMemoryName file = made.name();
  file.descriptor = ::open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  for (const SharedMemoryName& name : {guessed, swapped, longer, empty, file}) {
    EXPECT_EQ(SharedMemory::Open(name, Access::kRead).status().code(),
              StatusCode::kInvalidArgument);
  }
  ::close(file.descriptor);
  SharedMemoryName nobody = made.name();
  nobody.process = 0;
  EXPECT_EQ(SharedMemory::Open(nobody, Access::kRead).status().code(), StatusCode::kUnavailable);
}

TEST(SharedMemory, AnotherProcessOpensItByItsName) {
  const SharedMemory made = SharedMemory::Make(64).value();
  const pid_t child = ::fork();
  if (child == 0) {
    const auto opened = SharedMemory::Open(made.name(), Access::kWrite);
    if (opened.ok()) opened->bytes()[5] = std::byte{9};
    ::_exit(opened.ok() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(made.bytes()[5], std::byte{9});
}

}  // namespace
}  // namespace icecache
