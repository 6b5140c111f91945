#include "kernels/memory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <utility>

namespace icecache {
namespace {

TEST(HostBuffer, IsAlignedZeroedAndAtLeastAsLargeAsAsked) {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{4097}, size_t{5} << 20}) {
    Result<HostBuffer> buffer = HostBuffer::Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status().ToString();
    EXPECT_GE(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 4096, 0u);
    EXPECT_EQ(buffer->span().front(), std::byte{0});
    EXPECT_EQ(buffer->span().back(), std::byte{0});
    buffer->span().back() = std::byte{1};
  }
}

TEST(HostBuffer, MovesOwnership) {
  HostBuffer a = HostBuffer::Allocate(100).value();
  std::byte* const data = a.data();
  HostBuffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);  // NOLINT(bugprone-use-after-move): the moved-from state is defined
  b = HostBuffer::Allocate(100).value();
  EXPECT_NE(b.data(), nullptr);
}

TEST(HostBuffer, RefusesWhatCannotBe) {
  EXPECT_EQ(HostBuffer::Allocate(std::numeric_limits<size_t>::max()).status().code(),
            StatusCode::kInvalidArgument);
  const Result<HostBuffer> huge = HostBuffer::Allocate(size_t{1} << 60);
  EXPECT_EQ(huge.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(huge.status().message().find("memory"), std::string::npos);
}

}  // namespace
}  // namespace icecache
