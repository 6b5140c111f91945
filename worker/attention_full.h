// Full KV in the worker: dense attention over every token. What all sparse methods are measured
// against.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "worker/decode_attention.h"
#include "worker/local_kv.h"

namespace icecache {

class AttentionFull final : public DecodeAttention {
 public:
  // Borrows both. `kv` holds the document already, or nothing.
  AttentionFull(const ModelShape& shape, LocalKv& kv, AttentionBackend& backend)
      : shape_(shape), kv_(kv), backend_(backend), token_(shape, TokenPos(0), 1) {}

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return backend_.on_device(); }
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override { stats_ = {}; }
  uint64_t kv_bytes() const override { return kv_.bytes(); }

 private:
  const ModelShape shape_;
  LocalKv& kv_;
  AttentionBackend& backend_;
  LayerRows token_;
  AttentionStates states_;
  std::vector<AttentionItem> items_;
  AttentionStats stats_;
};

}  // namespace icecache
