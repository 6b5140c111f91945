#include "common/model_shape.h"

namespace icecache {
namespace {

Status Bounded(const char* field, uint32_t value, uint32_t max) {
  if (value >= 1 && value <= max) return OkStatus();
  return InvalidArgument("model shape: " + std::string(field) + " = " + std::to_string(value) +
                         ", expected 1.." + std::to_string(max));
}

}  // namespace

Status ModelShape::Validate() const {
  KV_RETURN_IF_ERROR(Bounded("layers", layers, limits::kLayersMax));
  KV_RETURN_IF_ERROR(Bounded("kv_heads", kv_heads, limits::kKvHeadsMax));
  KV_RETURN_IF_ERROR(Bounded("query_heads", query_heads, limits::kKvHeadsMax * limits::kGroupMax));
  KV_RETURN_IF_ERROR(Bounded("head_dim", head_dim, limits::kHeadDimMax));
  if (query_heads % kv_heads != 0 || group() > limits::kGroupMax) {
    return InvalidArgument("model shape: " + std::to_string(query_heads) + " query heads over " +
                           std::to_string(kv_heads) + " kv heads; expected 1.." +
                           std::to_string(limits::kGroupMax) + " whole query heads per kv head");
  }
  if (head_dim % 16 != 0) {
    return InvalidArgument("model shape: head_dim = " + std::to_string(head_dim) +
                           ", expected a multiple of 16");
  }
  if (static_cast<uint8_t>(dtype) > static_cast<uint8_t>(DType::kBF16)) {
    return InvalidArgument("model shape: unknown dtype " + std::to_string(static_cast<int>(dtype)) +
                           "; expected f32, f16 or bf16");
  }
  return OkStatus();
}

std::string ModelShape::ToString() const {
  return std::to_string(layers) + " layers, " + std::to_string(kv_heads) + " kv heads x " +
         std::to_string(kv_heads == 0 ? 0 : group()) + ", head_dim " + std::to_string(head_dim) +
         ", " + std::string(DTypeName(dtype));
}

}  // namespace icecache
