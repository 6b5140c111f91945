#include <cstring>
#include <numeric>

#include "kernels/gpu/device_frames.h"
#include "tests/conformance/device_suite.h"

namespace icecache::gpu {
namespace {

std::vector<uint8_t> Counting(size_t count) {
  std::vector<uint8_t> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(i * 7 + i / 256);
  return bytes;
}

using DeviceMemorySuite = DeviceSuite;

TEST_P(DeviceMemorySuite, CopiesInOrderAndBetweenKinds) {
  auto pinned = DeviceMemory::Allocate(*device_, MemoryKind::kPinned, 1000);
  ASSERT_TRUE(pinned.ok());
  const std::vector<uint8_t> a = Counting(1000), b(1000, 9);
  uint8_t* const first = Upload(a);
  uint8_t* const second = Room<uint8_t>(1000);
  device_->Copy(second, first, 1000);
  device_->Copy(first, b.data(), 1000);  // after the copy above
  device_->Copy(pinned->data(), second, 1000);
  Sync();
  EXPECT_EQ(std::memcmp(pinned->data(), a.data(), 1000), 0);
  EXPECT_EQ(Download(first, 1000), b);
}

TEST_P(DeviceMemorySuite, AccountsForMemoryAndRefusesMoreThanItsBound) {
  const uint64_t before = device_->bytes_in_use(MemoryKind::kDevice);
  {
    auto memory = DeviceMemory::Allocate(*device_, MemoryKind::kDevice, 4096);
    ASSERT_TRUE(memory.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory->data()) % 256, 0u);
    EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), before + 4096);
  }
  EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), before);
  const auto refused =
      DeviceMemory::Allocate(*device_, MemoryKind::kDevice, device_->info().memory_bytes_max + 1);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(refused.status().message().find("--gpu-memory"), std::string::npos);
  EXPECT_TRUE(device_->Synchronize().ok());  // and nothing sticks
}

TEST_P(DeviceMemorySuite, SharedMemoryIsCountedInItsUnitsAndHasAName) {
  const uint64_t before = device_->bytes_in_use(MemoryKind::kDevice);
  auto shared = DeviceMemory::Allocate(*device_, MemoryKind::kShared, kSharedUnit + 1);
  ASSERT_TRUE(shared.ok());
  EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), before + 2 * kSharedUnit);
  const auto handle = device_->Export(shared->data());
  ASSERT_TRUE(handle.ok()) << handle.status().ToString();
  const auto decoded = DecodeMemoryHandle(*handle);
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded->bytes, 2 * kSharedUnit);
  EXPECT_EQ(decoded->device, device_->info().id);
  const auto refused =
      DeviceMemory::Allocate(*device_, MemoryKind::kShared, device_->info().memory_bytes_max + 1);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  std::byte outside{};
  EXPECT_FALSE(device_->Export(&outside).ok());
  *shared = DeviceMemory();
  EXPECT_EQ(device_->bytes_in_use(MemoryKind::kDevice), before);
}

// What one device writes the other reads, also when the first has let go of it.
TEST_P(DeviceMemorySuite, SharedMemoryIsOpenedByItsName) {
  if (GetParam().name == "cuda") GTEST_SKIP() << "only another process can (page_ways_test)";
  const auto other = GetParam().make().value();
  auto shared = DeviceMemory::Allocate(*device_, MemoryKind::kShared, 100);
  const auto handle = device_->Export(shared->data()).value();
  const auto opened = other->Open(handle);
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  EXPECT_EQ(opened->size(), kSharedUnit);
  const std::vector<uint8_t> content = Counting(1000);
  other->Copy(opened->data() + 24, content.data(), content.size());
  ASSERT_TRUE(other->Synchronize().ok());
  EXPECT_EQ(Download(shared->data<uint8_t>(24), 1000), content);
  *shared = DeviceMemory();
  std::vector<uint8_t> found(1000);
  other->Copy(found.data(), opened->data() + 24, found.size());
  ASSERT_TRUE(other->Synchronize().ok());
  EXPECT_EQ(found, content);
  other->Close(opened->data());
  EXPECT_FALSE(other->Open(handle).ok()) << "nothing has that name any more";
}

TEST_P(DeviceMemorySuite, RecordedWorkRunsWhenReplayedAndReadsMemoryAsItIsThen) {
  auto pinned = DeviceMemory::Allocate(*device_, MemoryKind::kPinned, 2 * sizeof(float));
  ASSERT_TRUE(pinned.ok());
  float* const x = Room<float>(1);
  float* const y = Room<float>(1);
  float* const weight = Upload(std::vector<float>{3.0f});
  const GemmArgs product{
      x, reinterpret_cast<const std::byte*>(weight), nullptr, y, DType::kF32, 1, 1, 1, false};
  device_->Launch(product);  // loads the kernel, as users of Record do
  Sync();
  const auto recording = device_->Record([&] {
    device_->Copy(x, pinned->data(), sizeof(float));
    device_->Launch(product);
    device_->Copy(pinned->data<float>(sizeof(float)), y, sizeof(float));
  });
  ASSERT_TRUE(recording.ok()) << recording.status().ToString();
  for (const float value : {2.0f, -5.0f}) {
    pinned->data<float>()[0] = value;
    device_->Replay(*recording);
    Sync();
    EXPECT_EQ(pinned->data<float>()[1], 3.0f * value);
  }
}

// Every alignment of both ends, in one launch; what lies between the spans stays.
TEST_P(DeviceMemorySuite, SpansAreCopiedToTheByte) {
  const std::vector<uint8_t> source = Counting(40000);
  const std::byte* const from = reinterpret_cast<const std::byte*>(Upload(source));
  std::vector<uint8_t> expected(40000, 0xee);
  uint8_t* const to = Upload(expected);
  std::vector<CopySpan> spans;
  size_t at = 0;
  for (const uint32_t bytes : {16u, 8192u, 4u, 100u, 1u, 15u, 4096u, 8193u, 0u}) {
    for (const size_t shift : {size_t{0}, size_t{4}, size_t{1}}) {
      at = (at + 31) / 16 * 16 + (bytes % 16 == 0 ? 0 : shift);
      if (at + bytes > expected.size()) break;
      spans.push_back({from + shift, reinterpret_cast<std::byte*>(to + at), bytes});
      std::memcpy(expected.data() + at, source.data() + shift, bytes);
      at += bytes;
    }
  }
  ASSERT_GE(spans.size(), 18u);
  device_->Launch(CopyArgs{Upload(spans), static_cast<uint32_t>(spans.size())});
  EXPECT_EQ(Download(to, 40000), expected);
}

TEST_P(DeviceMemorySuite, FramesArriveOnTheDeviceOnceTheyAreMarked) {
  DeviceFrames frames(*device_);
  DeviceMemory list;
  const auto one = frames.AllocateChunk(4096);
  const auto two = frames.AllocateChunk(4096);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(frames.bytes(), 8192u);
  std::byte outside{};
  EXPECT_EQ(frames.OnDevice(&outside), nullptr);
  EXPECT_EQ(frames.OnDevice(*one + 4096) == frames.OnDevice(*two), *one + 4096 == *two);
  for (const auto& chunk : {*one, *two}) std::memset(chunk, 1, 4096);
  frames.MarkDirty(*one, 4096);
  const uint64_t first = frames.MarkDirty(*two, 4096);
  const uint64_t before = device_->synchronize_count();
  frames.AwaitCopies(first);
  EXPECT_EQ(device_->synchronize_count(), before) << "it is not queued yet";
  ASSERT_TRUE(frames.QueueCopies(&list).ok());
  for (int again = 0; again < 2; ++again) {
    frames.AwaitCopies(first);
    EXPECT_EQ(device_->synchronize_count(), before + 1) << "once for all";
  }
  std::memset(*one, 2, 4096);
  frames.MarkDirty(*one + 256, 512);  // only this part is to go
  ASSERT_TRUE(frames.QueueCopies(&list).ok());
  Sync();
  const auto* const twin = reinterpret_cast<const uint8_t*>(frames.OnDevice(*one));
  const std::vector<uint8_t> content = Download(twin, 4096);
  for (size_t i = 0; i < content.size(); ++i) {
    ASSERT_EQ(content[i], i >= 256 && i < 768 ? 2 : 1) << "byte " << i;
  }
  const std::vector<uint8_t> other =
      Download(reinterpret_cast<const uint8_t*>(frames.OnDevice(*two + 4095)), 1);
  EXPECT_EQ(other[0], 1);
}

INSTANTIATE_DEVICES(DeviceMemorySuite);

TEST(CudaDevice, SaysWhyThereIsNone) {
  const auto device = MakeCudaDevice({});
  if (device.ok()) GTEST_SKIP() << "there is one: " << (*device)->info().name;
  EXPECT_EQ(device.status().code(), StatusCode::kUnavailable);
  EXPECT_GT(device.status().message().size(), 10u) << device.status().ToString();
}

}  // namespace
}  // namespace icecache::gpu
