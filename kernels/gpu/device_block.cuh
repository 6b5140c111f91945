// DeviceBlock: block.h's view of a real GPU. Only for .cu files.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

class DeviceBlock {
 public:
  __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t lane() const { return threadIdx.x % kWarpLanes; }
  __device__ __forceinline__ uint32_t warp() const { return threadIdx.x / kWarpLanes; }
  __device__ __forceinline__ uint32_t x() const { return blockIdx.x; }
  __device__ __forceinline__ uint32_t y() const { return blockIdx.y; }
  __device__ __forceinline__ uint32_t grid_x() const { return gridDim.x; }

  // Dynamic shared memory from its first byte; 16-byte aligned, content undefined.
  template <typename T>
  __device__ __forceinline__ T* shared(uint32_t byte_offset = 0) const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(memory) + byte_offset);
  }

  __device__ __forceinline__ void Sync() { __syncthreads(); }
  __device__ __forceinline__ void SyncWarp() { __syncwarp(); }
  template <typename T>
  __device__ __forceinline__ T ShuffleXor(T x, uint32_t mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  // d += a b on the tensor cores: m16n8k16, a row-major, b column-major, f32 sums. Fragments as in
  // PTX ISA, "Matrix Fragments for mma.m16n8k16". kBf16: elements are bf16, else f16.
  template <bool kBf16>
  __device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    if constexpr (kBf16) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
};

}  // namespace icecache::gpu
