#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kernels/gpu/device.h"

namespace icecache::gpu {
namespace {

constexpr size_t kAlignment = 256;

class EmulatedRunner {
 public:
  explicit EmulatedRunner(ThreadOrder order) : order_(order) {}
  template <typename Kernel>
  void Run(GridSize grid, uint32_t shared_bytes, const typename Kernel::Args& args) {
    Emulate<Kernel>(grid, shared_bytes, args, order_);
  }

 private:
  const ThreadOrder order_;
};

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedDeviceOptions& options) : runner_(options.order) {
    info_.name = "emulated";
    info_.processors = 4;  // small, so that tests see work being split
    info_.memory_bytes_max = options.memory_bytes_max;
    info_.registers = options.registers;
  }
  ~EmulatedDevice() override {
    KV_CHECK(sizes_[0].empty() && sizes_[1].empty() && registered_.empty());
  }

  const DeviceInfo& info() const override { return info_; }

  Result<std::byte*> Allocate(MemoryKind kind, size_t bytes) override {
    if (kind == MemoryKind::kDevice && in_use(kind) + bytes > info_.memory_bytes_max) {
      return ResourceExhausted(
          std::to_string(bytes) + " bytes of device memory: " + std::to_string(in_use(kind)) +
          " of " + std::to_string(info_.memory_bytes_max) + " are in use; raise --gpu-memory");
    }
    const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr) return ResourceExhausted(std::to_string(bytes) + " bytes of memory");
    std::memset(memory, 0xff, rounded);  // NaN in every float format
    sizes_[static_cast<size_t>(kind)][memory] = bytes;
    return memory;
  }

  void Free(MemoryKind kind, std::byte* memory) override {
    RunQueue();
    KV_CHECK(sizes_[static_cast<size_t>(kind)].erase(memory) == 1);
    std::free(memory);
  }

  uint64_t bytes_in_use(MemoryKind kind) const override { return in_use(kind); }

  Result<const std::byte*> Register(std::span<const std::byte> host) override {
    if (!info_.registers) return Unavailable("this device reads no memory of the host's");
    KV_CHECK(registered_.insert(host.data()).second);
    return host.data();
  }

  void Unregister(const std::byte* host) override {
    RunQueue();
    KV_CHECK(registered_.erase(host) == 1);
  }

  void Copy(void* to, const void* from, size_t bytes) override {
    target().push_back([=] { std::memcpy(to, from, bytes); });
  }

  void Launch(const KernelCall& call) override {
    target().push_back(
        [this, call] { std::visit([this](const auto& args) { Dispatch(runner_, args); }, call); });
  }

  Result<RecordingId> Record(const std::function<void()>& work) override {
    KV_CHECK(!recording_);
    recording_ = true;
    recordings_.emplace_back();
    work();
    recording_ = false;
    return RecordingId{static_cast<uint32_t>(recordings_.size() - 1)};
  }

  void Replay(RecordingId recording) override {
    for (const auto& step : recordings_[recording.value]) target().push_back(step);
  }

  Status Synchronize() override {
    RunQueue();
    ++synchronize_count_;
    return OkStatus();
  }
  uint64_t synchronize_count() const override { return synchronize_count_; }

 private:
  using Steps = std::vector<std::function<void()>>;

  uint64_t in_use(MemoryKind kind) const {
    uint64_t sum = 0;
    for (const auto& [memory, bytes] : sizes_[static_cast<size_t>(kind)]) sum += bytes;
    return sum;
  }
  Steps& target() { return recording_ ? recordings_.back() : queue_; }
  void RunQueue() {
    KV_CHECK(!recording_);
    for (const auto& step : queue_) step();
    queue_.clear();
  }

  DeviceInfo info_;
  EmulatedRunner runner_;
  std::map<std::byte*, size_t> sizes_[2];  // by MemoryKind
  std::set<const std::byte*> registered_;
  Steps queue_;
  uint64_t synchronize_count_ = 0;
  std::vector<Steps> recordings_;
  bool recording_ = false;
};

}  // namespace

Result<DeviceMemory> DeviceMemory::Allocate(Device& device, MemoryKind kind, size_t bytes) {
  DeviceMemory memory;
  KV_ASSIGN_OR_RETURN(memory.data_, device.Allocate(kind, bytes));
  memory.device_ = &device;
  memory.kind_ = kind;
  memory.bytes_ = bytes;
  return memory;
}

Status DeviceMemory::Grow(Device& device, MemoryKind kind, size_t bytes, DeviceMemory* memory) {
  if (memory->bytes() >= bytes) return OkStatus();
  *memory = DeviceMemory();
  KV_ASSIGN_OR_RETURN(*memory, Allocate(device, kind, bytes + bytes / 4));
  return OkStatus();
}

std::unique_ptr<Device> MakeEmulatedDevice(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace icecache::gpu
