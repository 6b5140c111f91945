// Small pieces that every DecodeAttention is made of: one token at a time out of a block, and the
// states of one kv head's group out of a layer's.
#pragma once

#include <chrono>
#include <cstdint>

#include "common/clock.h"
#include "common/model_shape.h"
#include "common/status.h"
#include "kernels/attention.h"
#include "worker/decode_attention.h"

namespace icecache {

// One token of LayerAttention::Attend.
struct TokenCall {
  TokenPos position;
  const float* q = nullptr;  // [query_heads, head_dim]
  const float* k = nullptr;  // [kv_heads, head_dim]
  const float* v = nullptr;
  float* out = nullptr;  // [query_heads, head_dim]

  const float* queries(const ModelShape& shape, uint16_t kv_head) const {
    return q + size_t{kv_head} * shape.group() * shape.head_dim;
  }
};

// Calls fn(TokenCall) for each token in order; stops at the first error.
template <typename Fn>
Status ForEachToken(const ModelShape& shape, TokenPos first, uint32_t tokens, const float* q,
                    const float* k, const float* v, float* out, const Fn& fn) {
  const size_t q_row = size_t{shape.query_heads} * shape.head_dim;
  const size_t kv_row = size_t{shape.kv_heads} * shape.head_dim;
  for (uint32_t t = 0; t < tokens; ++t) {
    KV_RETURN_IF_ERROR(fn(TokenCall{TokenPos(first.value + t), q + t * q_row, k + t * kv_row,
                                    v + t * kv_row, out + t * q_row}));
  }
  return OkStatus();
}

// The states of one kv head's group within the states of all query heads of a layer.
inline AttentionStateRef GroupStates(const ModelShape& shape, AttentionStates& layer,
                                     uint16_t kv_head) {
  const AttentionStateRef all = layer.ref();
  const uint32_t first = kv_head * shape.group();
  return {shape.group(), shape.head_dim, all.max + first, all.denom + first, all.row(first)};
}

// Attention to the items alone, as one result.
inline Status AttendTo(AttentionBackend& backend, std::span<const AttentionItem> items,
                       const AttentionResult& result) {
  const Status started = backend.Start(items);
  const Status finished = backend.FinishTo({&result, 1});
  return started.ok() ? finished : started;
}

inline void CountAttended(AttentionStats* stats, uint64_t heads, uint64_t tokens_per_head) {
  stats->heads += heads;
  stats->attended_tokens += heads * tokens_per_head;
}

// Adds its own lifetime to *total.
class AttentionTimer {
 public:
  explicit AttentionTimer(Duration* total)
      : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~AttentionTimer() { *total_ += std::chrono::steady_clock::now() - start_; }
  AttentionTimer(const AttentionTimer&) = delete;
  AttentionTimer& operator=(const AttentionTimer&) = delete;

 private:
  Duration* const total_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace icecache
