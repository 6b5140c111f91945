// What the body of a kernel sees of the machine it runs on: its place in the grid, shared memory,
// barriers, and the few operations in which the lanes of a warp work together.
//
// A kernel is a struct with `Args` (a POD), `kThreads`, and
//
//   template <typename Block> KV_GPU static void Run(Block& block, const Args& args);
//
// nvcc compiles the body against DeviceBlock (device_block.cuh), the host's compiler against
// EmulatedBlock (emulator.h): the same index arithmetic on both, so all of it is tested on machines
// without a GPU. Rules that make this work: every lane of a warp takes part in each warp operation,
// every thread of a block in each Sync(), and blocks have whole warps. The emulator enforces them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/status.h"

#if defined(__CUDACC__)
#include "kernels/gpu/device_numbers.cuh"
#define KV_GPU __device__ __forceinline__
#define KV_UNROLL _Pragma("unroll")  // arrays indexed in the loop stay in registers
#else
#define KV_GPU inline
#define KV_UNROLL
#endif

namespace icecache::gpu {

inline constexpr uint32_t kWarpLanes = 32;

struct GridSize {
  uint32_t x = 1;  // up to 2^31 - 1
  uint32_t y = 1;  // up to 65535
};

// N 32-bit words that are read and written at once, from addresses aligned to their size.
template <uint32_t N>
struct alignas(4 * N) Words {
  uint32_t w[N];
};

template <typename T>
KV_GPU T Load(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const T*>(from);
#else
  KV_CHECK(reinterpret_cast<uintptr_t>(from) % alignof(T) == 0);  // a GPU traps on this
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
#endif
}

template <typename T>
KV_GPU void Store(void* to, const T& x) {
#if defined(__CUDACC__)
  *static_cast<T*>(to) = x;
#else
  KV_CHECK(reinterpret_cast<uintptr_t>(to) % alignof(T) == 0);
  std::memcpy(to, &x, sizeof(T));
#endif
}

template <typename T>
KV_GPU T Min(T a, T b) {
  return b < a ? b : a;
}

#if !defined(__CUDACC__)
inline uint32_t RoundF16(float x) { return F32ToF16(x); }
inline float WidenF16(uint32_t bits) { return F16ToF32(static_cast<uint16_t>(bits)); }
inline uint32_t RoundBF16(float x) { return F32ToBF16(x); }
inline float WidenBF16(uint32_t bits) { return BF16ToF32(static_cast<uint16_t>(bits)); }
#endif

// Element `index` of an array of `dtype`.
KV_GPU float LoadElement(const std::byte* array, DType dtype, size_t index) {
  if (dtype == DType::kF32) return Load<float>(array + 4 * index);
  const uint32_t bits = Load<uint16_t>(array + 2 * index);
  return dtype == DType::kF16 ? WidenF16(bits) : WidenBF16(bits);
}

KV_GPU void StoreElement(std::byte* array, DType dtype, size_t index, float x) {
  if (dtype == DType::kF32) return Store<float>(array + 4 * index, x);
  const uint32_t bits = dtype == DType::kF16 ? RoundF16(x) : RoundBF16(x);
  Store<uint16_t>(array + 2 * index, static_cast<uint16_t>(bits));
}

// The sum over `lanes` neighbouring lanes (a power of two up to the warp), in each of them.
template <typename Block, typename T>
KV_GPU T LaneSum(Block& block, T x, uint32_t lanes) {
  for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) x += block.ShuffleXor(x, mask);
  return x;
}

template <typename Block, typename T>
KV_GPU T LaneMax(Block& block, T x, uint32_t lanes) {
  for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) {
    const T other = block.ShuffleXor(x, mask);
    x = x < other ? other : x;
  }
  return x;
}

// The sum over all threads of a block of up to 1024, in each of them; two barriers. `scratch`:
// shared memory of 32 T that nothing else uses meanwhile.
template <typename Block, typename T>
KV_GPU T BlockSum(Block& block, T x, uint32_t threads, T* scratch) {
  x = LaneSum(block, x, kWarpLanes);
  if (block.lane() == 0) scratch[block.warp()] = x;
  block.Sync();
  T sum = 0;
  for (uint32_t warp = 0; warp < threads / kWarpLanes; ++warp) sum += scratch[warp];
  block.Sync();  // or the next use would overtake a slow reader
  return sum;
}

}  // namespace icecache::gpu
