// Attention through the cache server: sinks and window from the worker's memory, the pages that
// matter from the server (or from what is still here of them), and the server's estimate of
// everything else, merged into one softmax.
//
// A layer step: the token enters the window, the one it pushes out rides on the request; while the
// shards select, sinks and window are computed; pages are verified, placed and attended to when
// they arrive. A shard that misses the deadline is done without (last selection's pages, and tokens
// it may not have yet) and counted as degraded. Owner's thread: the decode thread.
//
// Three switches trade accuracy for time; docs/decode.md has what each costs.
//   prefetch     the next step's question of a layer goes out when the layer is done, with this
//                step's queries; heads whose queries then moved are asked again (prefetch.h)
//   layer_reuse  of so many layers the first, the anchor, is searched as a whole; the others look
//                near the tokens that it chose, and rank what is there by their own queries
//   int8         pages travel coded (kernels/int8_rows.h)
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
#include "worker/layer_selection.h"
#include "worker/page_cache.h"
#include "worker/sink_window.h"

namespace icecache {

struct TokenCall;
namespace gpu {
class DeviceFrames;
class PageIntake;
}  // namespace gpu

struct IceCacheOptions {
  SparseBudget budget;
  uint32_t resident_multiple = 3;  // pages kept here, in units of one selection's pages
  uint32_t read_cap = 0;           // tokens the server may read exactly for the residual
  // > 0: a head gets as many pages as reach this share of the mass by the server's estimate: fewer
  // than its budget where they suffice, up to budget_growth times its budget where they do not.
  float min_mass = 0;
  uint32_t budget_growth = 4;
  uint32_t check_every =
      0;  // one in so many layer steps, at random, is checked by the server; 0: none
  bool residual = true;
  Duration select_deadline = std::chrono::seconds(2);
  bool prefetch = false;
  float prefetch_cosine = 0.8f;  // of queries; below: ask again
  uint32_t layer_reuse = 1;      // layers per anchor, itself included; 1: every layer is one
  bool int8 = false;  // for pages in replies (reply mode inline); others are read as they are
  gpu::DeviceFrames* frames = nullptr;  // of the backend's device: pages are kept there, too
  gpu::PageIntake* intake = nullptr;    // of the same device: they are kept there alone
  PageSharing* sharing = nullptr;       // with intake: of that device's frames, with other workers

  uint32_t max_pages() const;        // of the budget
  uint32_t max_grown_pages() const;  // of a head that min_mass makes grow
};

class AttentionIceCache final : public DecodeAttention {
 public:
  // Borrows client and backend.
  AttentionIceCache(const ModelShape& shape, CacheClient& client, AttentionBackend& backend,
                    const IceCacheOptions& options);
  ~AttentionIceCache() override { Abandon(); }

  // Starts (again) from this state: `window` right after the last token of `context`, whose chain
  // `segments` names. Pages of these segments that are still here stay.
  void Begin(const ContextHandle& context, const SinkWindow& window,
             std::span<const wire::SegmentInfo> segments);

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return backend_.on_device(); }
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override { stats_ = {}; }
  uint64_t kv_bytes() const override { return window_.bytes() + arena_.bytes(); }

  // A layer step of one token in its parts, so that BatchAttention can take several sequences
  // through them side by side; Attend is all of them in this order. The call lives through all.
  //   1. Enter        the token enters the window, the question goes out
  //   2. AddLocal     what is here: to be attended to while the shards select
  //   3. Collect      waits for the answer, unless it has Arrived
  //   4. AddSelected  what came: to be attended to
  //   5. states       with everything attended to they are the result (AttentionBackend::FinishTo)
  //   6. Leave        the question of the token to come
  // After an error the step is over, and the next Enter begins another.
  Status Enter(LayerId layer, const TokenCall& call);
  void AddLocal(LayerId layer, const TokenCall& call, std::vector<AttentionItem>* items);
  bool Arrived() const { return asked_ == nullptr || client_.Arrived(asked_); }
  Status Collect(LayerId layer);
  void AddSelected(LayerId layer, const TokenCall& call, std::vector<AttentionItem>* items);
  AttentionStateRef states() { return states_.ref(); }
  void Leave(LayerId layer, const TokenCall& call);

 private:
  struct Layer {
    Layer(const ModelShape& shape, std::span<PageCache> caches, gpu::PageIntake* intake,
          AttentionStats* stats)
        : selection(shape, caches, intake, stats) {}
    LayerSelection selection;
    SelectCall ahead;                 // the question of the token to come, or none
    uint32_t ahead_end = 0;           // of the appended tokens that it carries
    TokenPos confirmed;               // tokens below are with every shard of the layer
    std::vector<float> asked;         // its queries
    std::vector<LayerRows> appended;  // its appended tokens
  };

  Status AttendToken(LayerId layer, const TokenCall& call);
  SelectCall Ask(LayerId layer, const float* queries, std::span<const KvHeadId> heads);
  void AskAhead(LayerId layer, const float* queries);
  Status Finish(LayerId layer, const SelectCall& call, uint32_t append_end);
  SelectParams Params(LayerId layer);
  bool Sampled();
  const LayerSelection* AnchorOf(LayerId layer) const;
  void Abandon();

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
  std::vector<KvHeadId> all_heads_;
  std::vector<Layer> layers_;
  // Of the step at hand.
  AttentionStates states_;
  std::vector<AttentionItem> items_;
  SelectCall asked_;        // not yet collected; null: the question of a step before will do
  uint32_t asked_end_ = 0;  // of the appended tokens that it carries to every shard
  uint64_t asks_ = 0;       // so far, for Sampled
  AttentionStats stats_;
};

}  // namespace icecache
