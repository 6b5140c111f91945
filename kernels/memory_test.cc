#include "kernels/memory.h"

#include <gtest/gtest.h>

#include <thread>

#include <cstdint>
#include <limits>
#include <utility>

#include "common/limits.h"

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

TEST(ScratchVector, GrowsAndMovesAcrossTheSizeFromWhichItTakesHugePages) {
  ScratchVector<uint32_t> numbers;
  for (uint32_t i = 0; i < (1u << 20); ++i) numbers.push_back(i);
  const ScratchVector<uint32_t> copy = numbers;
  ScratchVector<uint32_t> moved = std::move(numbers);
  moved.resize(10);
  moved.shrink_to_fit();
  for (uint32_t i = 0; i < moved.size(); ++i) EXPECT_EQ(moved[i], i);
  for (uint32_t i = 0; i < copy.size(); ++i) ASSERT_EQ(copy[i], i);
}

TEST(ScratchVector, LargeBlocksAreAlignedToAHugePageAndZeroedOnce) {
  for (const size_t bytes : {size_t{1} << 17, size_t{1} << 21, (size_t{5} << 20) + 1}) {
    auto* const memory = static_cast<std::byte*>(AllocateScratch(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % (2u << 20), 0u);
    EXPECT_EQ(memory[0], std::byte{0});
    memory[bytes - 1] = std::byte{1};
    FreeScratch(memory, bytes);
  }
}

TEST(ScratchVector, AThreadReusesWhatItHasFreed) {
  constexpr size_t kHuge = size_t{2} << 20;
  std::thread([] {
    auto* const whole = static_cast<std::byte*>(AllocateScratch(3 * kHuge));
    whole[0] = std::byte{7};
    FreeScratch(whole, 3 * kHuge);
    // Cut in two and joined again, in either order.
    for (const bool first_goes_first : {true, false}) {
      void* const first = AllocateScratch(kHuge);
      void* const rest = AllocateScratch(2 * kHuge);
      EXPECT_EQ(first, whole);
      EXPECT_EQ(rest, whole + kHuge);
      FreeScratch(first_goes_first ? first : rest, (first_goes_first ? 1 : 2) * kHuge);
      FreeScratch(first_goes_first ? rest : first, (first_goes_first ? 2 : 1) * kHuge);
    }
    EXPECT_EQ(AllocateScratch(3 * kHuge), whole);
    EXPECT_EQ(whole[0], std::byte{7});
    FreeScratch(whole, 3 * kHuge);
  }).join();
}

TEST(ScratchVector, AThreadKeepsABoundedAmount) {
  std::thread([] {
    // The second is more than may be kept besides the first: it goes back, and comes as zeroes.
    constexpr size_t kMost = limits::kScratchKeptBytesMax;
    void* const first = AllocateScratch(kMost);
    auto* const second = static_cast<std::byte*>(AllocateScratch(kMost));
    second[0] = std::byte{7};
    FreeScratch(first, kMost);
    FreeScratch(second, kMost);
    EXPECT_EQ(AllocateScratch(kMost), first);
    auto* const fresh = static_cast<std::byte*>(AllocateScratch(kMost));
    EXPECT_EQ(fresh[0], std::byte{0});
    FreeScratch(first, kMost);
    FreeScratch(fresh, kMost);
  }).join();
}

}  // namespace
}  // namespace icecache
