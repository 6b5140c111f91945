// Dense causal attention of one layer over a block of tokens: the compute-heavy half of prefill.
//
// Tiles of queries x keys: scores by sgemm, online softmax over the tiles, output by sgemm, so
// memory beyond the inputs is a few hundred KiB per thread whatever the length. Work is divided
// over (kv head, query tile) among threads. Cost: 2 * tokens * (past + tokens / 2) * head_dim *
// query_heads * 2 flop.
#pragma once

#include <cstdint>
#include <functional>

#include "common/model_shape.h"
#include "common/status.h"

namespace icecache {

// Told done of total, in units of the callee's choice, from the calling thread and in ascending
// order. Returning false asks to stop.
using ProgressFn = std::function<bool(uint64_t done, uint64_t total)>;

// One layer's keys and values before and within the block: k, v [past + tokens, kv_heads,
// head_dim], already rounded to the stored dtype by the caller. q and out: [tokens, query_heads,
// head_dim], q scaled by 1/sqrt(head_dim). Query i sees keys 0 .. past + i.
struct CausalBlock {
  uint32_t past = 0;
  uint32_t tokens = 0;
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  float* out = nullptr;
};

// CANCELLED when `progress` said stop (out is then undefined). `progress` may be empty.
// threads == 0: one per core.
Status CausalAttention(const ModelShape& shape, const CausalBlock& block, uint32_t threads,
                       const ProgressFn& progress);

// The brief form without a past.
inline Status CausalAttention(const ModelShape& shape, uint32_t tokens, const float* q,
                              const float* k, const float* v, uint32_t threads,
                              const ProgressFn& progress, float* out) {
  return CausalAttention(shape, CausalBlock{0, tokens, q, k, v, out}, threads, progress);
}

}  // namespace icecache
