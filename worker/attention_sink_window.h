// Sinks and a recent window only (StreamingLLM's pattern): what everything between them is worth
// shows in how much worse this is. Tokens that leave the window are forgotten.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "worker/decode_attention.h"
#include "worker/sink_window.h"

namespace icecache {

class AttentionSinkWindow final : public DecodeAttention {
 public:
  AttentionSinkWindow(const ModelShape& shape, AttentionBackend& backend)
      : shape_(shape),
        backend_(backend),
        token_(shape, TokenPos(0), 1),
        left_(shape, TokenPos(0), 1) {}

  // Starts (again) from this state: right after a document.
  void Begin(const SinkWindow& window) { window_ = window; }

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return backend_.on_device(); }
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override { stats_ = {}; }
  uint64_t kv_bytes() const override { return window_.bytes(); }

 private:
  const ModelShape shape_;
  AttentionBackend& backend_;
  SinkWindow window_;
  LayerRows token_, left_;
  AttentionStates states_;
  std::vector<AttentionItem> items_;
  AttentionStats stats_;
};

}  // namespace icecache
