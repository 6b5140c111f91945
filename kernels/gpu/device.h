// Device: memory and a queue of work on a GPU, or on its emulator. The seam between what is
// computed (kernels/gpu/*.h, the model, attention) and the CUDA runtime.
//
// Work is queued and runs in order; host code goes on. Host memory that a Copy or a kernel reads or
// writes must not be touched before Synchronize. Errors of queued work stick and come out of the
// next Synchronize, so callers queue without checking. The emulated device runs nothing before
// Synchronize: code that reads or overwrites too early fails there, always.
//
// One thread at a time. Implementations pass tests/conformance/device_suite.h.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"
#include "kernels/gpu/dispatch.h"
#include "kernels/gpu/emulator.h"
#include "kernels/gpu/memory_handle.h"

namespace icecache::gpu {

enum class MemoryKind : uint8_t {
  kDevice,  // the GPU's own
  kPinned,  // the host's, page-locked; kernels read and write it at the same address
  kShared,  // the GPU's own, counted with kDevice, in units of kSharedUnit: other processes may
            // open it
};

// A page of a GPU: no two allocations share one, so what is exported ends where it should.
inline constexpr size_t kSharedUnit = 2u << 20;

struct DeviceInfo {
  std::string name;               // "cuda: NVIDIA H100 80GB HBM3" | "emulated"
  uint32_t processors = 1;        // streaming multiprocessors
  uint64_t memory_bytes_max = 0;  // what Allocate(kDevice) and Allocate(kShared) give in all
  bool registers = false;         // Register takes memory that is mapped for reading only
  DeviceId id{};
};

// How host memory is mapped here that a device is to read.
enum class Mapping : uint8_t { kReadOnly, kWritable };

// Identifies recorded work.
struct RecordingId {
  uint32_t value = UINT32_MAX;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const DeviceInfo& info() const = 0;

  // 256-byte aligned, content undefined. RESOURCE_EXHAUSTED with the sizes when it does not fit
  // below memory_bytes_max. Free waits for queued work.
  virtual Result<std::byte*> Allocate(MemoryKind kind, size_t bytes) = 0;
  virtual void Free(MemoryKind kind, std::byte* memory) = 0;
  virtual uint64_t bytes_in_use(MemoryKind kind) const = 0;

  // Lets kernels read host memory that this process has mapped: the address at which they find it,
  // until Unregister (which waits for queued work, as Free does). Page-aligned. UNAVAILABLE,
  // RESOURCE_EXHAUSTED with the reason. Memory that another process may change.
  virtual Result<const std::byte*> Register(std::span<const std::byte> host, Mapping mapping) = 0;
  virtual void Unregister(const std::byte* host) = 0;

  // Names memory of kind kShared, all of it, for other processes (memory_handle.h).
  virtual Result<std::vector<std::byte>> Export(const std::byte* memory) = 0;
  // Memory that another process has exported: read and written by kernels and Copy until Close,
  // which waits for queued work; of this device, or of another that this one reads as its peer. It
  // lives on when that process ends. INVALID_ARGUMENT: forged, or of another kind of device.
  // UNAVAILABLE: the memory is gone, of another host, or out of this device's reach.
  virtual Result<std::span<std::byte>> Open(std::span<const std::byte> handle) = 0;
  virtual void Close(std::byte* opened) = 0;

  // Between any two kinds of memory, also pageable host memory (slower).
  virtual void Copy(void* to, const void* from, size_t bytes) = 0;
  virtual void Launch(const KernelCall& call) = 0;

  // Records what `work` queues instead of running it, to be queued as a whole by Replay: one launch
  // (a CUDA graph) instead of many. Only pinned and device memory in it, and only kernels that have
  // run before: some of their loading cannot be recorded.
  virtual Result<RecordingId> Record(const std::function<void()>& work) = 0;
  virtual void Replay(RecordingId recording) = 0;

  // Waits for everything queued; the first error since the last call.
  virtual Status Synchronize() = 0;
  // How often Synchronize has returned. When it has grown, what was queued before is over.
  virtual uint64_t synchronize_count() const = 0;
};

// Owning memory of a device. Moves; frees at its end.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { Reset(); }
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    if (this == &other) return *this;
    Reset();
    device_ = std::exchange(other.device_, nullptr);
    kind_ = other.kind_;
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    return *this;
  }

  static Result<DeviceMemory> Allocate(Device& device, MemoryKind kind, size_t bytes);
  // Makes room for at least `bytes`; content is lost when it grows.
  static Status Grow(Device& device, MemoryKind kind, size_t bytes, DeviceMemory* memory);

  template <typename T = std::byte>
  T* data(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(data_ + byte_offset);
  }
  size_t bytes() const { return bytes_; }

 private:
  void Reset() {
    if (data_ != nullptr) device_->Free(kind_, data_);
    data_ = nullptr;
    bytes_ = 0;
  }

  Device* device_ = nullptr;
  MemoryKind kind_ = MemoryKind::kDevice;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

struct EmulatedDeviceOptions {
  ThreadOrder order = ThreadOrder::kAscending;
  uint64_t memory_bytes_max = uint64_t{8} << 30;
  bool registers = true;
};

// The CPU as a slow, strict GPU (emulator.h).
std::unique_ptr<Device> MakeEmulatedDevice(const EmulatedDeviceOptions& options);

struct CudaDeviceOptions {
  int index = 0;
  std::optional<DeviceId> id{};   // this one, instead of the one at `index`
  bool products = true;           // false: no large matrix products, so no cuBLAS
  uint64_t memory_bytes_max = 0;  // 0: nine tenths of what is free now
};

// How many GPUs there are. UNAVAILABLE says why none; takes no memory of theirs.
Result<int> CountCudaDevices();
// UNAVAILABLE says why there is none: built without CUDA, no driver, no GPU, one that is too old.
Result<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options);

}  // namespace icecache::gpu
