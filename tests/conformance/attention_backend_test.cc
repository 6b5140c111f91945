#include <cstdio>
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
