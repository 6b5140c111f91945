#include "common/receive_buffers.h"

#include <gtest/gtest.h>

#include <cstring>

namespace icecache {
namespace {

TEST(ReceiveBuffers, BuffersAreAlignedLargeEnoughAndReused) {
  ReceiveBuffers pool(1u << 20);
  std::byte* first = nullptr;
  {
    const auto buffer = pool.Take(5000);
    first = buffer.data();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % ReceiveBuffers::kAlignment, 0u);
    std::memset(first, 1, 5000);
    EXPECT_EQ(pool.kept_bytes(), 0u);
  }
  EXPECT_EQ(pool.kept_bytes(), 8192u);
  EXPECT_EQ(pool.Take(8192).data(), first);
  EXPECT_NE(pool.Take(8193).data(), first);
}

TEST(ReceiveBuffers, KeepsNoMoreThanItsMaximum) {
  ReceiveBuffers pool(10000);
  { const auto a = pool.Take(8192), b = pool.Take(8192), c = pool.Take(1u << 20); }
  EXPECT_EQ(pool.kept_bytes(), 8192u);
}

TEST(ReceiveBuffers, BuffersMove) {
  ReceiveBuffers pool(1u << 20);
  auto a = pool.Take(100);
  std::byte* data = a.data();
  ReceiveBuffers::Buffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  b = ReceiveBuffers::Buffer();
  EXPECT_EQ(b.data(), nullptr);
}

}  // namespace
}  // namespace icecache
