// Device on a real GPU: the border to the CUDA runtime (linked statically) and to cuBLAS (loaded
// when it is there). Their errors become Status here.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gpu/cublas.h"
#include "kernels/gpu/device.h"
#include "kernels/gpu/device_block.cuh"

namespace icecache::gpu {
namespace {

constexpr int kOldestMajor = 8;  // mma.m16n8k16 with bf16

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    RunKernel(const __grid_constant__ typename Kernel::Args args) {
  DeviceBlock block;
  Kernel::Run(block, args);
}

Status StatusOf(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return OkStatus();
  const std::string message =
      what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  return error == cudaErrorMemoryAllocation ? ResourceExhausted(message) : Internal(message);
}

DeviceId IdOf(const cudaDeviceProp& properties) {
  DeviceId id;
  static_assert(sizeof(id) == sizeof(properties.uuid));
  std::memcpy(id.data(), &properties.uuid, sizeof(id));
  return id;
}

// The allocation that an address of the device lies in. The runtime does not tell; the driver does.
Result<std::span<std::byte>> AllocationAt(void* address) {
  using GetRange = int (*)(unsigned long long*, size_t*, unsigned long long);
  void* entry = nullptr;
#if CUDART_VERSION >= 12050
  KV_RETURN_IF_ERROR(StatusOf(
      cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, 3020, cudaEnableDefault),
      "cuMemGetAddressRange"));
#else
  KV_RETURN_IF_ERROR(
      StatusOf(cudaGetDriverEntryPoint("cuMemGetAddressRange", &entry, cudaEnableDefault),
               "cuMemGetAddressRange"));
#endif
  unsigned long long base = 0;
  size_t bytes = 0;
  if (entry == nullptr || reinterpret_cast<GetRange>(entry)(
                              &base, &bytes, reinterpret_cast<unsigned long long>(address)) != 0) {
    return Unavailable("the driver does not say how large the memory is");
  }
  return std::span(reinterpret_cast<std::byte*>(base), bytes);
}

// Keeps the first error until it is asked for.
class StickyStatus {
 public:
  void Add(cudaError_t error, const char* what) {
    if (error != cudaSuccess) Add(StatusOf(error, what));
  }
  void Add(Status status) {
    if (status_.ok()) std::swap(status_, status);  // nvcc warns of plain assignment
  }
  Status Take() {
    Status status;
    std::swap(status_, status);
    return status;
  }

 private:
  Status status_;
};

// Launches Dispatch's choices on a stream.
class CudaRunner {
 public:
  CudaRunner(cudaStream_t stream, StickyStatus& status) : stream_(stream), status_(status) {}

  template <typename Kernel>
  void Run(GridSize grid, uint32_t shared_bytes, const typename Kernel::Args& args) {
    if (grid.x == 0 || grid.y == 0) return;
    static_assert(sizeof(typename Kernel::Args) <= 4096);  // what a launch carries
    RunKernel<Kernel><<<dim3(grid.x, grid.y), Kernel::kThreads, shared_bytes, stream_>>>(args);
    status_.Add(cudaGetLastError(), "kernel launch");
  }

 private:
  const cudaStream_t stream_;
  StickyStatus& status_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(DeviceInfo info, cudaStream_t stream) : info_(std::move(info)), stream_(stream) {}

  ~CudaDevice() override {
    (void)cudaStreamSynchronize(stream_);
    rounded_ = DeviceMemory();  // while there is something to free it with
    for (const cudaGraphExec_t graph : graphs_) (void)cudaGraphExecDestroy(graph);
    cublas_.reset();
    (void)cudaStreamDestroy(stream_);
  }

  void LoadCublas() {
    cublas_ = Cublas::Load(stream_);
    info_.name += cublas_ ? ", cuBLAS" : ", own matrix products (libcublas was not found)";
  }

  const DeviceInfo& info() const override { return info_; }

  Result<std::byte*> Allocate(MemoryKind kind, size_t bytes) override {
    void* memory = nullptr;
    if (kind == MemoryKind::kShared) {
      bytes = std::max<size_t>(1, (bytes + kSharedUnit - 1) / kSharedUnit) * kSharedUnit;
    }
    if (kind != MemoryKind::kPinned) {
      const uint64_t used = bytes_in_use(MemoryKind::kDevice);
      if (used + bytes > info_.memory_bytes_max) {
        return ResourceExhausted(
            std::to_string(bytes) + " bytes of device memory: " + std::to_string(used) + " of " +
            std::to_string(info_.memory_bytes_max) + " are in use; raise --gpu-memory");
      }
      KV_RETURN_IF_ERROR(StatusOf(cudaMalloc(&memory, std::max<size_t>(bytes, 1)),
                                  "cudaMalloc of " + std::to_string(bytes) + " bytes"));
    } else {
      KV_RETURN_IF_ERROR(StatusOf(cudaHostAlloc(&memory, std::max<size_t>(bytes, 1),
                                                cudaHostAllocPortable | cudaHostAllocMapped),
                                  "cudaHostAlloc of " + std::to_string(bytes) + " bytes"));
    }
    in_use_[static_cast<size_t>(kind)] += bytes;
    sizes_[memory] = bytes;
    return static_cast<std::byte*>(memory);
  }

  void Free(MemoryKind kind, std::byte* memory) override {
    status_.Add(cudaStreamSynchronize(stream_), "work before a free");
    const auto it = sizes_.find(memory);
    KV_CHECK(it != sizes_.end());
    in_use_[static_cast<size_t>(kind)] -= it->second;
    sizes_.erase(it);
    if (kind == MemoryKind::kPinned) {
      status_.Add(cudaFreeHost(memory), "cudaFreeHost");
    } else {
      status_.Add(cudaFree(memory), "cudaFree");
    }
  }

  uint64_t bytes_in_use(MemoryKind kind) const override {
    const auto shared = static_cast<size_t>(MemoryKind::kShared);
    return in_use_[static_cast<size_t>(kind)] + (kind == MemoryKind::kDevice ? in_use_[shared] : 0);
  }

  Result<const std::byte*> Register(std::span<const std::byte> host, Mapping mapping) override {
    if (!info_.registers && mapping == Mapping::kReadOnly) {
      return Unavailable("this GPU or its driver registers no memory that is mapped read-only");
    }
    auto* const base = const_cast<std::byte*>(host.data());
    const unsigned flags =
        cudaHostRegisterMapped | (mapping == Mapping::kReadOnly ? cudaHostRegisterReadOnly : 0u);
    KV_RETURN_IF_ERROR(StatusOf(cudaHostRegister(base, host.size(), flags),
                                "cudaHostRegister of " + std::to_string(host.size()) + " bytes"));
    void* seen = nullptr;
    if (const cudaError_t error = cudaHostGetDevicePointer(&seen, base, 0); error != cudaSuccess) {
      (void)cudaHostUnregister(base);
      return StatusOf(error, "cudaHostGetDevicePointer");
    }
    return static_cast<const std::byte*>(seen);
  }

  void Unregister(const std::byte* host) override {
    status_.Add(cudaStreamSynchronize(stream_), "work before an end of registration");
    status_.Add(cudaHostUnregister(const_cast<std::byte*>(host)), "cudaHostUnregister");
  }

  Result<std::vector<std::byte>> Export(const std::byte* memory) override {
    const auto it = sizes_.find(const_cast<std::byte*>(memory));
    if (it == sizes_.end() || it->second % kSharedUnit != 0) {
      return InvalidArgument("only memory of kind kShared is exported");
    }
    cudaIpcMemHandle_t name;
    KV_RETURN_IF_ERROR(StatusOf(cudaIpcGetMemHandle(&name, it->first), "cudaIpcGetMemHandle"));
    MemoryHandle handle;
    handle.device = info_.id;
    handle.bytes = it->second;
    static_assert(sizeof(name) == sizeof(handle.name));
    std::memcpy(handle.name.data(), &name, sizeof(name));
    return EncodeMemoryHandle(handle);
  }

  Result<std::span<std::byte>> Open(std::span<const std::byte> bytes) override {
    KV_ASSIGN_OR_RETURN(const MemoryHandle handle, DecodeMemoryHandle(bytes));
    if (handle.kind != MemoryHandle::Kind::kCuda) {
      return InvalidArgument("the memory is not a GPU's");
    }
    cudaIpcMemHandle_t name;
    std::memcpy(&name, handle.name.data(), sizeof(name));
    void* memory = nullptr;
    if (const cudaError_t error =
            cudaIpcOpenMemHandle(&memory, name, cudaIpcMemLazyEnablePeerAccess);
        error != cudaSuccess) {
      (void)cudaGetLastError();  // it does not stick
      return Unavailable("memory that another process has exported cannot be opened: " +
                         std::string(cudaGetErrorString(error)));
    }
    const Result<std::span<std::byte>> all = AllocationAt(memory);
    if (!all.ok() || all->data() != memory || all->size() < handle.bytes) {
      (void)cudaIpcCloseMemHandle(memory);
      return all.ok() ? InvalidArgument("a forged memory handle: it says more bytes than there are")
                      : all.status();
    }
    return std::span(static_cast<std::byte*>(memory), handle.bytes);
  }

  void Close(std::byte* opened) override {
    status_.Add(cudaStreamSynchronize(stream_), "work before memory is closed");
    status_.Add(cudaIpcCloseMemHandle(opened), "cudaIpcCloseMemHandle");
  }

  void Copy(void* to, const void* from, size_t bytes) override {
    if (bytes == 0) return;
    status_.Add(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copy");
  }

  void Launch(const KernelCall& call) override {
    const auto* const gemm = std::get_if<GemmArgs>(&call);
    if (gemm != nullptr && gemm->tokens > kGemvTokensMax && cublas_ && !recording_) {
      return LaunchLibrary(*gemm);
    }
    CudaRunner runner(stream_, status_);
    std::visit([&runner](const auto& args) { Dispatch(runner, args); }, call);
  }

  Result<RecordingId> Record(const std::function<void()>& work) override {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    KV_RETURN_IF_ERROR(StatusOf(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
                                "begin of a recording"));
    recording_ = true;
    work();
    recording_ = false;
    KV_RETURN_IF_ERROR(StatusOf(cudaStreamEndCapture(stream_, &graph), "end of a recording"));
    const Status made = StatusOf(cudaGraphInstantiate(&exec, graph, 0), "a recording");
    (void)cudaGraphDestroy(graph);
    KV_RETURN_IF_ERROR(made);
    graphs_.push_back(exec);
    return RecordingId{static_cast<uint32_t>(graphs_.size() - 1)};
  }

  void Replay(RecordingId recording) override {
    status_.Add(cudaGraphLaunch(graphs_[recording.value], stream_), "replay");
  }

  Status Synchronize() override {
    status_.Add(cudaStreamSynchronize(stream_), "work on the GPU");
    ++synchronize_count_;
    return status_.Take();
  }
  uint64_t synchronize_count() const override { return synchronize_count_; }

 private:
  // A library's product: both sides in the weights' type, f32 sums.
  void LaunchLibrary(const GemmArgs& args) {
    CudaRunner runner(stream_, status_);
    const uint64_t x_count = uint64_t{args.tokens} * args.cols;
    const void* x = args.x;
    if (args.w_dtype != DType::kF32) {
      const Status room = DeviceMemory::Grow(*this, MemoryKind::kDevice, x_count * 2, &rounded_);
      if (!room.ok()) return Dispatch(runner, args);  // the tiles need no memory
      Dispatch(runner, ConvertArgs{args.x, rounded_.data(), args.w_dtype, x_count, x_count});
      x = rounded_.data();
    }
    bool add = args.add;
    if (args.bias != nullptr && !add) {  // lay the bias out and add to it
      Dispatch(runner, ConvertArgs{args.bias, reinterpret_cast<std::byte*>(args.y), DType::kF32,
                                   uint64_t{args.tokens} * args.rows, args.rows});
      add = true;
    } else if (args.bias != nullptr) {
      return Dispatch(runner, args);  // no supported model adds a biased product
    }
    status_.Add(cublas_->Multiply(args, x, add));
  }

  DeviceInfo info_;
  const cudaStream_t stream_;
  StickyStatus status_;
  std::unique_ptr<Cublas> cublas_;
  DeviceMemory rounded_;
  std::vector<cudaGraphExec_t> graphs_;
  bool recording_ = false;
  uint64_t synchronize_count_ = 0;
  uint64_t in_use_[3] = {};  // by MemoryKind
  std::map<void*, size_t> sizes_;
};

}  // namespace

Result<int> CountCudaDevices() {
  // Without a driver this is cudaErrorInsufficientDriver, not "no device": every error means none.
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return Unavailable(std::string("no GPU: ") + cudaGetErrorString(error) + " (" +
                       cudaGetErrorName(error) + ")");
  }
  return count;
}

Result<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options) {
  KV_ASSIGN_OR_RETURN(const int count, CountCudaDevices());
  const auto step = [](cudaError_t error, const char* what) {
    const Status status = StatusOf(error, what);
    return status.ok() ? status : Unavailable(status.message());
  };
  cudaDeviceProp properties;
  int index = options.id ? 0 : options.index;
  for (; options.id && index < count; ++index) {
    KV_RETURN_IF_ERROR(step(cudaGetDeviceProperties(&properties, index), "GPU properties"));
    if (IdOf(properties) == *options.id) break;
  }
  if (index < 0 || index >= count) {
    return Unavailable(
        (options.id ? std::string("no such GPU") : "no GPU " + std::to_string(index)) +
        ": there are " + std::to_string(count) + " that this process sees");
  }
  KV_RETURN_IF_ERROR(step(cudaSetDevice(index), "cudaSetDevice"));
  KV_RETURN_IF_ERROR(step(cudaGetDeviceProperties(&properties, index), "GPU properties"));
  const std::string name = properties.name;
  if (properties.major < kOldestMajor) {
    return Unavailable(name + " has compute capability " + std::to_string(properties.major) + "." +
                       std::to_string(properties.minor) + "; 8.0 or later is needed");
  }
  size_t free_bytes = 0, total_bytes = 0;
  KV_RETURN_IF_ERROR(step(cudaMemGetInfo(&free_bytes, &total_bytes), "GPU memory"));
  DeviceInfo info;
  info.name = "cuda: " + name;
  info.id = IdOf(properties);
  info.processors = static_cast<uint32_t>(properties.multiProcessorCount);
  int registers = 0;
  KV_RETURN_IF_ERROR(
      step(cudaDeviceGetAttribute(&registers, cudaDevAttrHostRegisterReadOnlySupported, index),
           "GPU properties"));
  info.registers = registers != 0;
  const uint64_t most = free_bytes / 10 * 9;
  info.memory_bytes_max =
      options.memory_bytes_max == 0 ? most : std::min<uint64_t>(options.memory_bytes_max, most);
  cudaStream_t stream = nullptr;
  KV_RETURN_IF_ERROR(step(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"));
  auto device = std::make_unique<CudaDevice>(std::move(info), stream);
  if (options.products) device->LoadCublas();
  return std::unique_ptr<Device>(std::move(device));
}

}  // namespace icecache::gpu
