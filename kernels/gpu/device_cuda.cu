// Device on a real GPU: the border to the CUDA runtime (linked statically) and to cuBLAS (loaded
// when it is there). Their errors become Status here.
#include <cuda_runtime.h>

#include <algorithm>
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
    if (kind == MemoryKind::kDevice) {
      if (in_use_[0] + bytes > info_.memory_bytes_max) {
        return ResourceExhausted(
            std::to_string(bytes) + " bytes of device memory: " + std::to_string(in_use_[0]) +
            " of " + std::to_string(info_.memory_bytes_max) + " are in use; raise --gpu-memory");
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
    if (kind == MemoryKind::kDevice) {
      status_.Add(cudaFree(memory), "cudaFree");
    } else {
      status_.Add(cudaFreeHost(memory), "cudaFreeHost");
    }
  }

  uint64_t bytes_in_use(MemoryKind kind) const override {
    return in_use_[static_cast<size_t>(kind)];
  }

  Result<const std::byte*> Register(std::span<const std::byte> host) override {
    if (!info_.registers) {
      return Unavailable("this GPU or its driver registers no memory that is mapped read-only");
    }
    auto* const base = const_cast<std::byte*>(host.data());
    KV_RETURN_IF_ERROR(StatusOf(
        cudaHostRegister(base, host.size(), cudaHostRegisterMapped | cudaHostRegisterReadOnly),
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
  uint64_t in_use_[2] = {};  // by MemoryKind
  std::map<void*, size_t> sizes_;
};

}  // namespace

Result<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options) {
  // Without a driver this is cudaErrorInsufficientDriver, not "no device": every error means none.
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return Unavailable(std::string("no GPU: ") + cudaGetErrorString(error) + " (" +
                       cudaGetErrorName(error) + ")");
  }
  if (options.index < 0 || options.index >= count) {
    return Unavailable("no GPU " + std::to_string(options.index) + ": there are " +
                       std::to_string(count));
  }
  const auto step = [](cudaError_t error, const char* what) {
    const Status status = StatusOf(error, what);
    return status.ok() ? status : Unavailable(status.message());
  };
  KV_RETURN_IF_ERROR(step(cudaSetDevice(options.index), "cudaSetDevice"));
  cudaDeviceProp properties;
  KV_RETURN_IF_ERROR(step(cudaGetDeviceProperties(&properties, options.index), "GPU properties"));
  const std::string name = properties.name;
  if (properties.major < kOldestMajor) {
    return Unavailable(name + " has compute capability " + std::to_string(properties.major) + "." +
                       std::to_string(properties.minor) + "; 8.0 or later is needed");
  }
  size_t free_bytes = 0, total_bytes = 0;
  KV_RETURN_IF_ERROR(step(cudaMemGetInfo(&free_bytes, &total_bytes), "GPU memory"));
  DeviceInfo info;
  info.name = "cuda: " + name;
  info.processors = static_cast<uint32_t>(properties.multiProcessorCount);
  int registers = 0;
  KV_RETURN_IF_ERROR(step(
      cudaDeviceGetAttribute(&registers, cudaDevAttrHostRegisterReadOnlySupported, options.index),
      "GPU properties"));
  info.registers = registers != 0;
  const uint64_t most = free_bytes / 10 * 9;
  info.memory_bytes_max =
      options.memory_bytes_max == 0 ? most : std::min<uint64_t>(options.memory_bytes_max, most);
  cudaStream_t stream = nullptr;
  KV_RETURN_IF_ERROR(step(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"));
  auto device = std::make_unique<CudaDevice>(std::move(info), stream);
  device->LoadCublas();
  return std::unique_ptr<Device>(std::move(device));
}

}  // namespace icecache::gpu
