// Conversions between f32 and 16-bit floats on a GPU: block.h's counterparts of common/dtype.h, equal
// to them bit by bit but for the payload of NaNs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace icecache::gpu {

__device__ __forceinline__ uint32_t RoundF16(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ float WidenF16(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ __forceinline__ uint32_t RoundBF16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ float WidenBF16(uint32_t bits) { return __uint_as_float(bits << 16); }

}  // namespace icecache::gpu
