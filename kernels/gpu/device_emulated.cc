#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "common/shared_memory.h"
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
    for (const auto& sizes : sizes_) KV_CHECK(sizes.empty());
    KV_CHECK(registered_.empty() && opened_.empty());
  }

  const DeviceInfo& info() const override { return info_; }

  Result<std::byte*> Allocate(MemoryKind kind, size_t bytes) override {
    const uint64_t used = bytes_in_use(MemoryKind::kDevice);
    if (kind != MemoryKind::kPinned && used + bytes > info_.memory_bytes_max) {
      return ResourceExhausted(
          std::to_string(bytes) + " bytes of device memory: " + std::to_string(used) + " of " +
          std::to_string(info_.memory_bytes_max) + " are in use; raise --gpu-memory");
    }
    if (kind == MemoryKind::kShared) return AllocateShared(bytes);
    const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr) return ResourceExhausted(std::to_string(bytes) + " bytes of memory");
    std::memset(memory, 0xff, rounded);  // NaN in every float format
    sizes_[static_cast<size_t>(kind)][memory] = bytes;
    return memory;
  }

  void Free(MemoryKind kind, std::byte* memory) override {
    RunQueue();
    auto& sizes = sizes_[static_cast<size_t>(kind)];
    const auto it = sizes.find(memory);
    KV_CHECK(it != sizes.end());
    if (kind == MemoryKind::kShared) {
      shared_.erase(memory);
    } else {
      std::free(memory);
    }
    sizes.erase(it);
  }

  uint64_t bytes_in_use(MemoryKind kind) const override {
    const uint64_t shared = kind == MemoryKind::kDevice ? in_use(MemoryKind::kShared) : 0;
    return in_use(kind) + shared;
  }

  Result<std::vector<std::byte>> Export(const std::byte* memory) override {
    const auto it = shared_.find(const_cast<std::byte*>(memory));
    if (it == shared_.end()) return InvalidArgument("only memory of kind kShared is exported");
    MemoryHandle handle;
    handle.kind = MemoryHandle::Kind::kEmulated;
    handle.bytes = sizes_[static_cast<size_t>(MemoryKind::kShared)].at(it->first);
    const SharedMemoryName& name = it->second.name();
    std::memcpy(handle.name.data(), &name, sizeof(name));
    return EncodeMemoryHandle(handle);
  }

  Result<std::span<std::byte>> Open(std::span<const std::byte> bytes) override {
    KV_ASSIGN_OR_RETURN(const MemoryHandle handle, DecodeMemoryHandle(bytes));
    if (handle.kind != MemoryHandle::Kind::kEmulated) {
      return InvalidArgument("the memory is a GPU's, and this device is emulated");
    }
    SharedMemoryName name;
    std::memcpy(&name, handle.name.data(), sizeof(name));
    if (name.bytes != handle.bytes) return InvalidArgument("a forged memory handle: two sizes");
    KV_ASSIGN_OR_RETURN(SharedMemory shared,
                        SharedMemory::Open(name, SharedMemory::Access::kWrite));
    const std::span<std::byte> memory = shared.bytes();
    opened_.emplace(memory.data(), std::move(shared));
    return memory;
  }

  void Close(std::byte* opened) override {
    RunQueue();
    KV_CHECK(opened_.erase(opened) == 1);
  }

  Result<const std::byte*> Register(std::span<const std::byte> host, Mapping mapping) override {
    if (!info_.registers && mapping == Mapping::kReadOnly) {
      return Unavailable("this device reads no memory of the host's that is mapped read-only");
    }
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
  Result<std::byte*> AllocateShared(size_t bytes) {
    const size_t rounded =
        std::max<size_t>(1, (bytes + kSharedUnit - 1) / kSharedUnit) * kSharedUnit;
    KV_ASSIGN_OR_RETURN(SharedMemory shared, SharedMemory::Make(rounded));
    std::byte* const first = shared.bytes().data();
    std::memset(first, 0xff, rounded);  // as in Allocate
    shared_.emplace(first, std::move(shared));
    sizes_[static_cast<size_t>(MemoryKind::kShared)][first] = rounded;
    return first;
  }

  Steps& target() { return recording_ ? recordings_.back() : queue_; }
  void RunQueue() {
    KV_CHECK(!recording_);
    for (const auto& step : queue_) step();
    queue_.clear();
  }

  DeviceInfo info_;
  EmulatedRunner runner_;
  std::map<std::byte*, size_t> sizes_[3];  // by MemoryKind
  std::map<std::byte*, SharedMemory> shared_, opened_;
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
