// The fixture of all tests that run on every kind of Device: the emulator in both thread orders,
// and a GPU where there is one. Suites: device_test.cc (memory and queue),
// device_attention_test.cc, device_layers_test.cc. Instantiate with INSTANTIATE_DEVICES(Suite).
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gpu/device.h"

namespace icecache::gpu {

struct DeviceCase {
  std::string name;
  std::function<Result<std::unique_ptr<Device>>()> make;
};
inline std::ostream& operator<<(std::ostream& out, const DeviceCase& c) { return out << c.name; }

inline Result<std::unique_ptr<Device>> EmulatedFor(ThreadOrder order) {
  if (kEmulatorIsSlow) return Unavailable("kernels are not emulated under ThreadSanitizer");
  EmulatedDeviceOptions options;
  options.order = order;
  return MakeEmulatedDevice(options);
}

inline auto AllDevices() {
  return testing::Values(
      DeviceCase{"emulated", [] { return EmulatedFor(ThreadOrder::kAscending); }},
      DeviceCase{"emulated_descending", [] { return EmulatedFor(ThreadOrder::kDescending); }},
      DeviceCase{"cuda", [] { return MakeCudaDevice({}); }});
}

class DeviceSuite : public testing::TestWithParam<DeviceCase> {
 protected:
  void SetUp() override {
    auto device = GetParam().make();
    if (!device.ok()) GTEST_SKIP() << GetParam().name << ": " << device.status().ToString();
    device_ = std::move(*device);
  }
  void TearDown() override {
    if (device_ != nullptr) {
      EXPECT_TRUE(device_->Synchronize().ok());
    }
    memory_.clear();  // before the device
  }

  // Device memory with this content, alive until the end of the test.
  template <typename T>
  T* Upload(std::span<const T> content) {
    T* const at = Room<T>(content.size());
    device_->Copy(at, content.data(), content.size_bytes());
    Sync();
    return at;
  }
  template <typename T>
  T* Upload(const std::vector<T>& content) {
    return Upload(std::span<const T>(content));
  }
  // Of undefined content.
  template <typename T>
  T* Room(size_t count) {
    auto memory = DeviceMemory::Allocate(*device_, MemoryKind::kDevice, count * sizeof(T));
    KV_CHECK(memory.ok());
    memory_.push_back(std::move(*memory));
    return memory_.back().template data<T>();
  }
  template <typename T>
  std::vector<T> Download(const T* from, size_t count) {
    std::vector<T> content(count);
    device_->Copy(content.data(), from, count * sizeof(T));
    Sync();
    return content;
  }
  void Sync() {
    const Status status = device_->Synchronize();
    ASSERT_TRUE(status.ok()) << status.ToString();
  }

  std::unique_ptr<Device> device_;
  std::vector<DeviceMemory> memory_;
};

#define INSTANTIATE_DEVICES(suite)                                        \
  INSTANTIATE_TEST_SUITE_P(Devices, suite, ::icecache::gpu::AllDevices(), \
                           [](const auto& device_case) { return device_case.param.name; })

}  // namespace icecache::gpu
