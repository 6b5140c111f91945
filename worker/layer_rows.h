// LayerRows: K and V of consecutive tokens of one layer, all kv heads, in the stored dtype. Per
// head the K rows [tokens, head_dim] are contiguous, then the V rows: the form in which rows travel
// (PutRows, FetchRows) and in which TokenRows reads them. A value without a thread of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "kernels/paged_kv.h"

namespace icecache {

class LayerRows {
 public:
  LayerRows() = default;
  // `tokens` rows per head from position `first`, all zero.
  LayerRows(const ModelShape& shape, TokenPos first, uint32_t tokens)
      : shape_(shape),
        first_(first),
        tokens_(tokens),
        data_(size_t{shape.kv_heads} * tokens * 2 * shape.row_bytes()) {}

  // Rounds k, v [count, kv_heads, head_dim] to the stored dtype into rows [begin, begin + count),
  // and writes what was stored back to k and v, so that whoever computes with them sees what others
  // will read.
  void RoundAndStore(uint32_t begin, uint32_t count, float* k, float* v);

  // One token's k, v [kv_heads, head_dim] at `position`. REQUIRES: tokens() == 1.
  void StoreToken(TokenPos position, const float* k, const float* v);

  TokenPos first() const { return first_; }
  uint32_t tokens() const { return tokens_; }
  std::span<const std::byte> k(KvHeadId head) const { return rows(2 * size_t{head.value}); }
  std::span<const std::byte> v(KvHeadId head) const { return rows(2 * size_t{head.value} + 1); }
  std::span<std::byte> k(KvHeadId head) { return mutable_rows(2 * size_t{head.value}); }
  std::span<std::byte> v(KvHeadId head) { return mutable_rows(2 * size_t{head.value} + 1); }
  TokenRows view(KvHeadId head) const {
    return {shape_.dtype, shape_.head_dim, tokens_, k(head).data(), v(head).data()};
  }
  const ModelShape& shape() const { return shape_; }
  size_t bytes() const { return data_.size(); }

 private:
  size_t block_bytes() const { return tokens_ * shape_.row_bytes(); }
  std::span<const std::byte> rows(size_t block) const {
    return {data_.data() + block * block_bytes(), block_bytes()};
  }
  std::span<std::byte> mutable_rows(size_t block) {
    return {data_.data() + block * block_bytes(), block_bytes()};
  }

  ModelShape shape_;
  TokenPos first_;
  uint32_t tokens_ = 0;
  std::vector<std::byte> data_;
};

}  // namespace icecache
