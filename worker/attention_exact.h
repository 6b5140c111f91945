// The exact top-k oracle: per query head the tokens with the largest logits, over full KV in the
// worker, with sinks and window always in. No cache can choose better tokens by this measure; it
// reads every key to do so.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "worker/decode_attention.h"
#include "worker/local_kv.h"

namespace icecache {

struct SparseBudget {
  uint32_t tokens = 256;  // per head, sinks and window included
  uint32_t sink_tokens = 16;
  uint32_t window_tokens = 16;

  // What is left for chosen tokens.
  uint32_t chosen() const {
    const uint32_t fixed = sink_tokens + window_tokens;
    return tokens > fixed ? tokens - fixed : 0;
  }
};

class AttentionExact final : public DecodeAttention {
 public:
  // Borrows both. `kv` holds the document already, or nothing.
  AttentionExact(const ModelShape& shape, LocalKv& kv, AttentionBackend& backend,
                 const SparseBudget& budget)
      : shape_(shape), kv_(kv), backend_(backend), budget_(budget), token_(shape, TokenPos(0), 1) {}

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return backend_.on_device(); }
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override { stats_ = {}; }
  uint64_t kv_bytes() const override { return kv_.bytes(); }

 private:
  void AttendHead(const float* queries, const TokenRows& rows, const AttentionStateRef& states);

  const ModelShape shape_;
  LocalKv& kv_;
  AttentionBackend& backend_;
  const SparseBudget budget_;
  LayerRows token_;
  AttentionStates states_;
  std::vector<AttentionItem> items_;
  std::vector<float> scores_;     // [group, candidates]
  std::vector<uint32_t> order_;   // candidates, best first up to the budget
  std::vector<float> value_row_;  // [head_dim]
  AttentionStats stats_;
};

}  // namespace icecache
