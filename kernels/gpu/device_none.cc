// In place of device_cuda.cu where icecache is built without CUDA.
#include "kernels/gpu/device.h"

namespace icecache::gpu {

Result<int> CountCudaDevices() {
  return Unavailable("this program was built without CUDA (no nvcc, or ICECACHE_CUDA=OFF)");
}

Result<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions&) {
  return CountCudaDevices().status();
}

}  // namespace icecache::gpu
