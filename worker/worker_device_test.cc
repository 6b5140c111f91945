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

// Pages go through a cache whose frames have twins. Some frames lie beyond the device's bound: they
// are staged, with the same result.
TEST_P(DeviceWorkerSuite, CachedPagesAreAttendedToOnTheDevice) {
  const ModelShape shape{1, 1, 2, 64, DType::kF16};
  gpu::DeviceFrames frames(*device_);
  const auto backend = gpu::MakeGpuAttention(*device_, &frames);
  const auto cpu = MakeCpuAttention();
  PageArena arena(shape.page_bytes(), &frames);
  PageCache cache(shape, 6, arena);
  std::mt19937_64 rng(10);
  const std::vector<float> q = Normal(rng, 2 * 64);
  for (int step = 0; step < 12; ++step) {
    cache.BeginStep();
    for (uint32_t i = 0; i < 3; ++i) {
      const PageId id(static_cast<uint32_t>(step + i) % 8);
      const auto fill = static_cast<uint8_t>(1 + (step + 5 * i) % 16);
      std::vector<std::byte> k(fill * 128), v(fill * 128);
      FromF32(Normal(rng, fill * 64).data(), fill * 64, DType::kF16, k.data());
      FromF32(Normal(rng, fill * 64).data(), fill * 64, DType::kF16, v.data());
      std::vector<uint32_t> positions(fill, 20);
      wire::PagePayload page{SegmentId(1), id, static_cast<uint32_t>(step + 1), fill, 0};
      page.k_rows = k;
      page.v_rows = v;
      page.positions = std::as_bytes(std::span(positions));
      page.checksum = PageChecksum({1, id.value, page.version}, k, v, page.positions);
      ASSERT_EQ(cache.Apply(page, TokenPos(0), TokenPos(100)), PageCache::Outcome::kReceived);
    }
    AttentionStates actual(2, 64), expected(2, 64);
    const AttentionItem item{q.data(), actual.ref(), {}, cache.view(), cache.selected()};
    ASSERT_TRUE(backend->Attend({&item, 1}).ok());
    cpu->AttendPages(q.data(), cache.view(), cache.selected(), expected.ref());
    std::vector<float> x(128), y(128);
    FinishStates(actual.ref(), x.data());
    FinishStates(expected.ref(), y.data());
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 2e-5f) << "step " << step;
  }
  EXPECT_GT(frames.bytes(), 0u);
  EXPECT_NE(frames.OnDevice(cache.view().pages[cache.selected()[0].value].k), nullptr);
}

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
