// What a worker with a GPU puts together: page frames with twins, prefill and attention on the
// device, against the same on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "kernels/gpu/attention_gpu.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "tests/conformance/device_suite.h"
#include "worker/attention_full.h"
#include "worker/model/prefill_attention.h"
#include "worker/page_cache.h"
#include "worker/prefill_device.h"

namespace icecache {
namespace {

std::vector<float> Normal(std::mt19937_64& rng, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& e : x) e = normal(rng);
  return x;
}

using DeviceWorkerSuite = gpu::DeviceSuite;

TEST_P(DeviceWorkerSuite, PrefillByBlocksEqualsTheCpus) {
  const ModelShape shape{1, 2, 6, 64, DType::kF16};
  std::mt19937_64 rng(8);
  const uint32_t total = 75, q_row = 6 * 64, kv_row = 2 * 64;
  std::vector<float> q = Normal(rng, total * q_row);
  for (float& e : q) e *= 0.375f;
  std::vector<float> k = Normal(rng, total * kv_row), v = Normal(rng, total * kv_row);
  LayerRows rows(shape, TokenPos(0), total);
  std::vector<float> expected(total * q_row), actual(total * q_row);
  DevicePrefill prefill(*device_, shape, total);
  uint32_t first = 0;
  for (const uint32_t tokens : {20u, 1u, 33u, 21u}) {
    rows.RoundAndStore(first, tokens, k.data() + first * kv_row, v.data() + first * kv_row);
    const size_t at = size_t{first} * q_row;
    ASSERT_TRUE(CausalAttention(shape,
                                CausalBlock{first, tokens, q.data() + at, k.data(), v.data(),
                                            expected.data() + at},
                                1, {})
                    .ok());
    const Status status = prefill.Attend(first, tokens, q.data() + at, rows, actual.data() + at);
    ASSERT_TRUE(status.ok()) << status.ToString();
    first += tokens;
  }
  ASSERT_EQ(first, total);
  for (size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 2e-5f) << i;
}

TEST_P(DeviceWorkerSuite, DecodeAttentionIsTheSameOnBothBackends) {
  const ModelShape shape{1, 2, 4, 64, DType::kBF16};
  const auto cpu = MakeCpuAttention();
  const auto on_device = gpu::MakeGpuAttention(*device_, nullptr);
  std::mt19937_64 rng(9);
  const std::vector<float> q = Normal(rng, 40 * 4 * 64), k = Normal(rng, 40 * 2 * 64),
                           v = Normal(rng, 40 * 2 * 64);
  auto pinned =
      gpu::DeviceMemory::Allocate(*device_, gpu::MemoryKind::kPinned, q.size() * sizeof(float));
  ASSERT_TRUE(pinned.ok());
  std::vector<float> expected(q.size());
  for (AttentionBackend* backend : {cpu.get(), on_device.get()}) {
    LocalKv kv(shape);
    AttentionFull attention(shape, kv, *backend);
    EXPECT_EQ(attention.on_device(), backend == on_device.get());
    float* const out = attention.on_device() ? pinned->data<float>() : expected.data();
    ASSERT_TRUE(
        attention.Attend(LayerId(0), TokenPos(0), 40, q.data(), k.data(), v.data(), out).ok());
  }
  Sync();
  for (size_t i = 0; i < q.size(); ++i) {
    ASSERT_NEAR(pinned->data<float>()[i], expected[i], 2e-5f) << i;
  }
}

// Pages of random rows, and a cache for them.
class DeviceCacheSuite : public DeviceWorkerSuite {
 protected:
  static constexpr ModelShape kShape{1, 1, 2, 64, DType::kF16};
  struct Content {
    std::vector<std::byte> k, v;
    std::vector<uint32_t> positions;
  };
  wire::PagePayload MakePage(uint32_t id, uint32_t version, uint8_t fill, Content* content) {
    content->k.resize(fill * kShape.row_bytes());
    content->v.resize(fill * kShape.row_bytes());
    FromF32(Normal(rng_, fill * 64).data(), fill * 64, DType::kF16, content->k.data());
    FromF32(Normal(rng_, fill * 64).data(), fill * 64, DType::kF16, content->v.data());
    content->positions.assign(fill, 20);
    wire::PagePayload page{SegmentId(1), PageId(id), version, fill, 0};
    page.k_rows = content->k;
    page.v_rows = content->v;
    page.positions = std::as_bytes(std::span(content->positions));
    page.checksum = PageChecksum({1, id, version}, content->k, content->v, page.positions);
    return page;
  }
  // The mean of the selected pages' attention, which differs from the expected by rounding.
  void ExpectAttention(AttentionBackend& backend, const PageCache& cache,
                       const AttentionStates& expected_states, const std::vector<float>& q) {
    AttentionStates actual(2, 64);
    const AttentionItem item{q.data(), actual.ref(), {}, cache.view(), cache.selected()};
    ASSERT_TRUE(backend.Attend({&item, 1}).ok());
    AttentionStates expected = expected_states;
    std::vector<float> x(128), y(128);
    FinishStates(actual.ref(), x.data());
    FinishStates(expected.ref(), y.data());
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 2e-5f);
  }
  // Random steps: some pages damaged, some of the cache's frames in the host's memory.
  void RunSteps(gpu::DeviceFrames& frames, gpu::PageIntake* intake) {
    const auto backend = gpu::MakeGpuAttention(*device_, &frames);
    const auto cpu = MakeCpuAttention();
    PageArena arena(kShape.page_bytes(), &frames, intake);
    PageCache cache(kShape, 6, arena);
    const std::vector<float> q = Normal(rng_, 2 * 64);
    for (uint32_t step = 0; step < 12; ++step) {
      SCOPED_TRACE(step);
      cache.BeginStep();
      AttentionStates expected(2, 64);
      std::vector<Content> contents(3);
      for (uint32_t i = 0; i < 3; ++i) {
        Content& content = contents[i];
        const auto fill = static_cast<uint8_t>(1 + (step + 5 * i) % 16);
        const wire::PagePayload page = MakePage((step + i) % 8, step + 1, fill, &content);
        ASSERT_EQ(cache.Apply(page, TokenPos(0), TokenPos(100)), PageCache::Outcome::kReceived);
        const TokenRows rows{DType::kF16, 64, fill, content.k.data(), content.v.data()};
        cpu->AttendRows(q.data(), rows, expected.ref());
      }
      if (intake != nullptr) {
        ASSERT_TRUE(intake->Flush().ok());
      }
      std::vector<PageCache::Damaged> damaged;
      ASSERT_TRUE(cache.Settle(&damaged).ok());
      EXPECT_TRUE(damaged.empty());
      ExpectAttention(*backend, cache, expected, q);
      EXPECT_TRUE(cache.Validate().ok());
    }
    EXPECT_GT(frames.bytes(), 0u);
    EXPECT_NE(frames.OnDevice(cache.view().pages[cache.selected()[0].value].k), nullptr);
  }

  std::mt19937_64 rng_{10};
};

TEST_P(DeviceCacheSuite, CachedPagesAreAttendedToOnTheDevice) {
  gpu::DeviceFrames frames(*device_);
  RunSteps(frames, nullptr);
}

TEST_P(DeviceCacheSuite, LandedPagesAreAttendedToOnTheDevice) {
  gpu::DeviceFrames frames(*device_);
  const auto intake = gpu::PageIntake::Make(*device_).value();
  RunSteps(frames, intake.get());
}

// Until it is settled a page is not listed; one that is damaged is named and gone.
TEST_P(DeviceCacheSuite, WhatTheDeviceDidNotVerifyIsNeitherListedNorSelected) {
  gpu::DeviceFrames frames(*device_);
  const auto intake = gpu::PageIntake::Make(*device_).value();
  PageArena arena(kShape.page_bytes(), &frames, intake.get());
  PageCache cache(kShape, 6, arena);
  const auto listed = [&cache] {
    std::vector<wire::ResidentPage> resident;
    cache.ListResident(&resident);
    return resident.size();
  };
  Content contents[3];
  for (uint32_t i = 0; i < 3; ++i) {
    wire::PagePayload page = MakePage(i, 1, 9, &contents[i]);
    if (i == 1) contents[i].v[5] ^= std::byte{8};
    page.place = i == 1 ? wire::PagePlace::kMapped : wire::PagePlace::kBody;
    ASSERT_EQ(cache.Apply(page, TokenPos(0), TokenPos(100)), PageCache::Outcome::kReceived);
  }
  ASSERT_TRUE(intake->Flush().ok());
  EXPECT_EQ(listed(), 0u);
  std::vector<PageCache::Damaged> damaged;
  ASSERT_TRUE(cache.Settle(&damaged).ok());
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].page.page, PageId(1));
  EXPECT_EQ(damaged[0].page.fill, 9);
  EXPECT_EQ(damaged[0].from, PageCache::From::kMapped);
  EXPECT_EQ(cache.selected().size(), 2u);
  EXPECT_EQ(listed(), 2u);
  EXPECT_TRUE(cache.Validate().ok());

  // A step that is given up leaves nothing behind, and its frame serves the next.
  cache.BeginStep();
  const wire::PagePayload again = MakePage(1, 1, 9, &contents[1]);
  ASSERT_EQ(cache.Apply(again, TokenPos(0), TokenPos(100)), PageCache::Outcome::kReceived);
  ASSERT_TRUE(intake->Flush().ok());
  cache.DropUnsettled();
  EXPECT_TRUE(cache.selected().empty());
  EXPECT_EQ(cache.page_count(), 2u);
  ASSERT_EQ(cache.Apply(again, TokenPos(0), TokenPos(100)), PageCache::Outcome::kReceived);
  ASSERT_TRUE(intake->Flush().ok());
  damaged.clear();
  ASSERT_TRUE(cache.Settle(&damaged).ok());
  EXPECT_TRUE(damaged.empty());
  EXPECT_EQ(listed(), 3u);
}

INSTANTIATE_DEVICES(DeviceCacheSuite);
INSTANTIATE_DEVICES(DeviceWorkerSuite);

TEST(DeviceFramesBound, PagesBeyondItStayOnTheHost) {
  const ModelShape shape{1, 1, 2, 64, DType::kF16};
  gpu::EmulatedDeviceOptions options;
  options.memory_bytes_max = 40 * shape.page_bytes();  // one chunk of 32 frames
  const auto device = gpu::MakeEmulatedDevice(options);
  {
    gpu::DeviceFrames frames(*device);
    PageArena arena(shape.page_bytes(), &frames);
    gpu::DeviceMemory list;
    std::byte* const first = arena.Allocate();
    EXPECT_NE(frames.OnDevice(first), nullptr);
    for (int i = 1; i < 32; ++i) arena.Allocate();
    std::byte* const beyond = arena.Allocate();
    EXPECT_EQ(frames.OnDevice(beyond), nullptr);
    std::memset(beyond, 1, shape.page_bytes());
    arena.Written(beyond, 64);  // nobody to tell
    EXPECT_TRUE(frames.QueueCopies(&list).ok());
  }
  EXPECT_TRUE(device->Synchronize().ok());
}

}  // namespace
}  // namespace icecache
