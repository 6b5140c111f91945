// Attention through the cache server: sinks and window from the worker's memory, the pages that
// matter from the server (or from what is still here of them), and the server's estimate of
// everything else, merged into one softmax.
//
// A layer step: the token enters the window, the one it pushes out rides on the request; while the
// shards select, sinks and window are computed; pages are verified, placed and attended to when
// they arrive. A shard that misses the deadline is done without (last selection's pages, and tokens
// it may not have yet) and counted as degraded. Owner's thread: the decode thread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "worker/appender.h"
#include "worker/attention_exact.h"
#include "worker/cache_client.h"
#include "worker/decode_attention.h"
#include "worker/page_cache.h"
#include "worker/sink_window.h"

namespace icecache {

struct TokenCall;
namespace gpu {
class DeviceFrames;
}

struct IceCacheOptions {
  SparseBudget budget;
  uint32_t resident_multiple = 3;  // pages kept here, in units of one selection's pages
  uint32_t read_cap = 0;           // tokens the server may read exactly for the residual
  float min_mass = 0;
  bool residual = true;
  Duration select_deadline = std::chrono::seconds(2);
  gpu::DeviceFrames* frames = nullptr;  // of the backend's device: pages are kept there, too

  uint32_t max_pages() const;
};

class AttentionIceCache final : public DecodeAttention, private SelectionSink {
 public:
  // Borrows client and backend.
  AttentionIceCache(const ModelShape& shape, CacheClient& client, AttentionBackend& backend,
                    const IceCacheOptions& options);

  // Starts (again) from this state: `window` right after the last token of `context`, whose chain
  // `segments` names. Pages of these segments that are still here stay.
  void Begin(const ContextHandle& context, const SinkWindow& window,
             std::span<const wire::SegmentInfo> segments);

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override { stats_ = {}; }
  uint64_t kv_bytes() const override { return window_.bytes() + arena_.bytes(); }

 private:
  struct Head {  // of the layer step at hand
    bool arrived = false;
    std::vector<float> residual;              // AttentionStates::flat, or empty
    std::vector<wire::ResidentPage> missing;  // failed verification and did not come again yet
  };

  Status AttendToken(LayerId layer, const TokenCall& call);
  Status AttendLocal(LayerId layer, const TokenCall& call);
  Status AttendSelected(LayerId layer, const TokenCall& call);
  PageCache& cache(LayerId layer, KvHeadId head) {
    return caches_[size_t{layer.value} * shape_.kv_heads + head.value];
  }
  TokenPos indexed_begin() const { return TokenPos(window_.sink_count(step_layer_)); }
  TokenPos indexed_end() const { return window_.window_first(step_layer_); }

  void ListResident(KvHeadId head, std::vector<wire::ResidentPage>* pages) override;
  void OnSelection(const wire::HeadSelection& selection,
                   std::vector<wire::ResidentPage>* refetch) override;
  void OnRefetched(KvHeadId head, const wire::PagePayload& page) override;

  const ModelShape shape_;
  CacheClient& client_;
  AttentionBackend& backend_;
  const IceCacheOptions options_;
  PageArena arena_;
  std::vector<PageCache> caches_;  // [layers, kv_heads]; empty without pages
  ContextHandle context_;
  SinkWindow window_;
  Appender appender_;
  LayerRows token_, left_;
  LayerId step_layer_;
  std::vector<Head> heads_;  // [kv_heads]
  AttentionStates states_;
  std::vector<AttentionItem> items_;
  Status local_status_;  // of AttendLocal in the step at hand
  AttentionStats stats_;
};

}  // namespace icecache
