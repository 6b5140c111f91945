#include <cstdio>
#include <cstring>
#include <utility>

#include "kernels/gpu/attention_gpu.h"
#include "tests/conformance/attention_backend_suite.h"

namespace icecache {
namespace {

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionBackendSuite,
                         testing::Values(BackendCase{"cpu", MakeCpuAttention}));
// The reference runs its own suite too: pages, rows and merges must agree with each other.
INSTANTIATE_TEST_SUITE_P(Reference, AttentionBackendSuite,
                         testing::Values(BackendCase{"reference", MakeReferenceAttention}));

// A backend with the device that it borrows.
class OwnedGpuAttention final : public AttentionBackend {
 public:
  explicit OwnedGpuAttention(std::unique_ptr<gpu::Device> device)
      : device_(std::move(device)), backend_(gpu::MakeGpuAttention(*device_, nullptr)) {}
  const char* name() const override { return backend_->name(); }
  Status Start(std::span<const AttentionItem> items) override { return backend_->Start(items); }
  Status Finish() override { return backend_->Finish(); }
  // The suite's results lie in the host's memory: through pinned memory.
  bool on_device() const override { return false; }
  Status FinishTo(std::span<const AttentionResult> results) override {
    std::vector<gpu::DeviceMemory> pinned;
    std::vector<AttentionResult> there(results.begin(), results.end());
    for (AttentionResult& result : there) {
      const size_t bytes = size_t{result.states.heads} * result.states.head_dim * sizeof(float);
      pinned.push_back(
          gpu::DeviceMemory::Allocate(*device_, gpu::MemoryKind::kPinned, bytes).value());
      result.out = pinned.back().data<float>();
    }
    KV_RETURN_IF_ERROR(backend_->FinishTo(there));
    KV_RETURN_IF_ERROR(device_->Synchronize());
    for (size_t i = 0; i < there.size(); ++i) {
      std::memcpy(results[i].out, pinned[i].data(),
                  size_t{there[i].states.heads} * there[i].states.head_dim * sizeof(float));
    }
    return OkStatus();
  }

 private:
  const std::unique_ptr<gpu::Device> device_;
  const std::unique_ptr<AttentionBackend> backend_;
};

std::unique_ptr<AttentionBackend> MakeEmulated(gpu::ThreadOrder order) {
  if (gpu::kEmulatorIsSlow) return nullptr;
  gpu::EmulatedDeviceOptions options;
  options.order = order;
  return std::make_unique<OwnedGpuAttention>(gpu::MakeEmulatedDevice(options));
}

std::unique_ptr<AttentionBackend> MakeCuda() {
  auto device = gpu::MakeCudaDevice({});
  if (!device.ok()) {  // the suite skips
    std::fprintf(stderr, "cuda: %s\n", device.status().ToString().c_str());
    return nullptr;
  }
  return std::make_unique<OwnedGpuAttention>(std::move(*device));
}

INSTANTIATE_TEST_SUITE_P(
    Emulated, AttentionBackendSuite,
    testing::Values(
        BackendCase{"ascending", [] { return MakeEmulated(gpu::ThreadOrder::kAscending); }},
        BackendCase{"descending", [] { return MakeEmulated(gpu::ThreadOrder::kDescending); }}));
INSTANTIATE_TEST_SUITE_P(Cuda, AttentionBackendSuite,
                         testing::Values(BackendCase{"cuda", MakeCuda}));

}  // namespace
}  // namespace icecache
