// Element types of stored K and V, and scalar conversions. Bulk conversion: kernels/distance.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace icecache {

// Stable numbers: they are part of a context's identity, on the wire and on disk.
enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

constexpr uint32_t DTypeBytes(DType t) { return t == DType::kF32 ? 4 : 2; }
std::string_view DTypeName(DType t);  // "f32" | "f16" | "bf16"
std::optional<DType> ParseDType(std::string_view name);

// Round to nearest even; NaN stays NaN; overflow becomes infinity.
uint16_t F32ToF16(float x);
float F16ToF32(uint16_t bits);
uint16_t F32ToBF16(float x);
float BF16ToF32(uint16_t bits);

}  // namespace icecache
