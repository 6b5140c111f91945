// ModelShape: the numbers of a model that fix the layout of its KV cache. Part of a context's
// identity: two contexts share segments only when their shapes are equal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/ids.h"
#include "common/limits.h"
#include "common/status.h"

namespace icecache {

struct ModelShape {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t query_heads = 0;  // per layer; a multiple of kv_heads
  uint32_t head_dim = 0;
  DType dtype = DType::kF16;  // of stored K and V

  friend bool operator==(const ModelShape&, const ModelShape&) = default;

  uint32_t group() const { return query_heads / kv_heads; }  // query heads per kv head
  size_t row_bytes() const { return size_t{head_dim} * DTypeBytes(dtype); }  // one K or one V row
  // A page frame: K rows, V rows, then the tokens' positions as u32.
  size_t page_bytes() const { return limits::kPageTokens * (2 * row_bytes() + sizeof(uint32_t)); }
  // K and V of one token over all layers and heads.
  size_t token_bytes() const { return size_t{layers} * kv_heads * 2 * row_bytes(); }

  // INVALID_ARGUMENT naming the field when a number is zero, above its limit or inconsistent.
  // head_dim must be a multiple of 16.
  Status Validate() const;
  std::string ToString() const;  // "4 layers, 2 kv heads x 4, head_dim 64, f16"
};

// The shard that owns the slice (layer, kv_head). Server and worker compute the same function, so
// a worker addresses the owner directly. Spreads the heads of one layer over the shards.
inline ShardId ShardOf(LayerId layer, KvHeadId head, const ModelShape& shape,
                       uint32_t shard_count) {
  return ShardId(
      static_cast<uint16_t>((uint32_t{layer.value} * shape.kv_heads + head.value) % shard_count));
}

}  // namespace icecache
