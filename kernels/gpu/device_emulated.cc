#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
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
      ::munmap(memory, it->second);
      ::close(shared_.at(memory).descriptor);
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
    std::memcpy(handle.name.data(), &it->second, sizeof(it->second));
    return EncodeMemoryHandle(handle);
  }

  Result<std::span<std::byte>> Open(std::span<const std::byte> bytes) override {
    KV_ASSIGN_OR_RETURN(const MemoryHandle handle, DecodeMemoryHandle(bytes));
    if (handle.kind != MemoryHandle::Kind::kEmulated) {
      return InvalidArgument("the memory is a GPU's, and this device is emulated");
    }
    EmulatedName name;
    std::memcpy(&name, handle.name.data(), sizeof(name));
    KV_ASSIGN_OR_RETURN(std::byte* const memory, MapShared(name, handle.bytes));
    opened_[memory] = handle.bytes;
    return std::span(memory, handle.bytes);
  }

  void Close(std::byte* opened) override {
    RunQueue();
    const auto it = opened_.find(opened);
    KV_CHECK(it != opened_.end());
    ::munmap(opened, it->second);
    opened_.erase(it);
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
  static std::string SharedName(const EmulatedName& name) {
    return "icecache-device-" + std::to_string(name.nonce[0]) + "-" + std::to_string(name.nonce[1]);
  }

  // A memfd, so that it ends with the last process that has it mapped.
  Result<std::byte*> AllocateShared(size_t bytes) {
    const size_t rounded =
        std::max<size_t>(1, (bytes + kSharedUnit - 1) / kSharedUnit) * kSharedUnit;
    std::random_device random;
    EmulatedName name{::getpid(), -1, {}};
    for (uint64_t& word : name.nonce) word = uint64_t{random()} << 32 | random();
    name.descriptor = ::memfd_create(SharedName(name).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (name.descriptor < 0) return ResourceExhausted("a descriptor for shared memory");
    void* memory = MAP_FAILED;
    if (::ftruncate(name.descriptor, static_cast<off_t>(rounded)) == 0 &&
        ::fcntl(name.descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
      memory = ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, name.descriptor, 0);
    }
    if (memory == MAP_FAILED) {
      ::close(name.descriptor);
      return ResourceExhausted(std::to_string(rounded) + " bytes of shared memory");
    }
    std::memset(memory, 0xff, rounded);  // as in Allocate
    auto* const first = static_cast<std::byte*>(memory);
    shared_[first] = name;
    sizes_[static_cast<size_t>(MemoryKind::kShared)][first] = rounded;
    return first;
  }

  // What a stranger names is opened only when it proves to be memory of AllocateShared: a memfd of
  // this size and name that nobody can cut short.
  static Result<std::byte*> MapShared(const EmulatedName& name, uint64_t bytes) {
    const std::string path =
        "/proc/" + std::to_string(name.process) + "/fd/" + std::to_string(name.descriptor);
    const int found =
        ::open(path.c_str(), O_PATH | O_CLOEXEC);  // whatever it is, it is not touched
    if (found < 0) {
      return Unavailable("the process that exported the memory is gone, or hidden from this one");
    }
    const std::string mine = "/proc/self/fd/" + std::to_string(found);
    char target[256] = {};
    const bool named = ::readlink(mine.c_str(), target, sizeof(target) - 1) > 0 &&
                       target == "/memfd:" + SharedName(name) + " (deleted)";
    const int fd = named ? ::open(mine.c_str(), O_RDWR | O_CLOEXEC) : -1;
    ::close(found);
    if (!named) return InvalidArgument("a forged memory handle: it names something else");
    struct stat status {};
    if (fd < 0 || ::fstat(fd, &status) != 0 || static_cast<uint64_t>(status.st_size) != bytes ||
        bytes == 0 || (::fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
      if (fd >= 0) ::close(fd);
      return InvalidArgument("a forged memory handle: no such memory of " + std::to_string(bytes) +
                             " bytes");
    }
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ::close(fd);
    if (memory == MAP_FAILED) return ResourceExhausted("room to map shared memory");
    return static_cast<std::byte*>(memory);
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
  std::map<std::byte*, EmulatedName> shared_;
  std::map<std::byte*, size_t> opened_;
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
