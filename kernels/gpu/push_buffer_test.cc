#include "kernels/gpu/push_buffer.h"

#include <gtest/gtest.h>

#include <random>

namespace icecache::gpu {
namespace {

constexpr uint32_t kMax = limits::kPushRegionBytesMax;

class PushBufferTest : public ::testing::Test {
 protected:
  std::unique_ptr<Device> device_ = MakeEmulatedDevice({});
  PushBuffer buffer_{*device_};
};

TEST_F(PushBufferTest, NothingIsLentBeforeItIsOffered) {
  EXPECT_EQ(buffer_.Reserve(100), nullptr);
  EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), 0u);
  const auto handle = buffer_.Offer();
  ASSERT_TRUE(handle.ok()) << handle.status().ToString();
  EXPECT_LE(handle->size(), limits::kMemoryHandleBytesMax);
  EXPECT_EQ(*buffer_.Offer(), *handle);
  EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), limits::kPushBytes);
  EXPECT_NE(buffer_.Reserve(100), nullptr);
  EXPECT_EQ(buffer_.Reserve(0), nullptr);
}

TEST_F(PushBufferTest, WhatIsThereIsLentInPiecesUpToTheMaximum) {
  ASSERT_TRUE(buffer_.Offer().ok());
  std::vector<std::shared_ptr<const PushRegion>> lent;
  while (auto region = buffer_.Reserve(100u << 20)) {
    EXPECT_EQ(region->bytes, kMax);
    lent.push_back(std::move(region));
  }
  EXPECT_EQ(lent.size(), limits::kPushBytes / kMax);
  lent.erase(lent.begin() + 1);
  const auto small = buffer_.Reserve(1000);
  const auto rest = buffer_.Reserve(kMax);
  EXPECT_EQ(small->offset, kMax);
  EXPECT_EQ(rest->bytes, kMax - small->bytes);
  EXPECT_EQ(buffer_.Reserve(16), nullptr);
}

TEST_F(PushBufferTest, RegionsNeverOverlapAndAllComeBack) {
  ASSERT_TRUE(buffer_.Offer().ok());
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::vector<std::shared_ptr<const PushRegion>> lent;
  for (int i = 0; i < 2000; ++i) {
    if (lent.empty() || random() % 2 == 0) {
      if (auto region = buffer_.Reserve(1 + random() % kMax)) lent.push_back(std::move(region));
    } else {
      lent.erase(lent.begin() + static_cast<long>(random() % lent.size()));
    }
    uint64_t bytes = 0;
    for (const auto& a : lent) {
      bytes += a->bytes;
      ASSERT_LE(a->offset + a->bytes, limits::kPushBytes);
      ASSERT_EQ(a->offset % 16, 0u);
      for (const auto& b : lent) {
        ASSERT_TRUE(a == b || a->offset + a->bytes <= b->offset ||
                    b->offset + b->bytes <= a->offset);
      }
    }
    ASSERT_EQ(bytes + buffer_.free_bytes(), limits::kPushBytes);
  }
  lent.clear();
  for (uint32_t i = 0; i < limits::kPushBytes / kMax; ++i) {  // in whole pieces again
    lent.push_back(buffer_.Reserve(kMax));
    ASSERT_TRUE(lent.back() != nullptr && lent.back()->bytes == kMax);
  }
}

}  // namespace
}  // namespace icecache::gpu
