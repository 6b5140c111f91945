// LayerSelection: what the server chose for one layer, as it comes in: pages go into the layer's
// caches, residuals wait to be merged.
//
// A question at a time: 1. Begin   2. the request is made (FillHead) and answered (OnSelection,
// OnRefetched), now or while other layers are at work   3. the caller merges head(h) and the pages
// that caches selected. Begin for some heads leaves what is known of the others as it is. Owner's
// thread: the decode thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "worker/cache_client.h"
#include "worker/decode_attention.h"
#include "worker/page_cache.h"

namespace icecache {

class LayerSelection final : public SelectionSink {
 public:
  struct Head {
    bool arrived = false;
    uint32_t page_count = 0;                  // in the answer, wherever they are
    uint32_t covered_end = 0;                 // tokens appended below here are in the answer
    std::vector<float> residual;              // AttentionStates::flat, or empty
    std::vector<wire::ResidentPage> missing;  // failed verification and did not come again yet
    std::vector<uint32_t> where;              // positions that RememberWhere noted
  };
  // Where the indexed tokens lie, and which appended ones the question carries.
  struct Range {
    TokenPos indexed_begin, indexed_end;
    uint32_t covered_end = 0;
  };

  // `caches`: one per kv head, or empty when no pages are kept. `intake`: of their arena, if it has
  // one. Borrows all; `stats` too.
  LayerSelection(const ModelShape& shape, std::span<PageCache> caches, gpu::PageIntake* intake,
                 AttentionStats* stats)
      : shape_(shape), caches_(caches), intake_(intake), stats_(stats), heads_(shape.kv_heads) {}

  // `anchor`: the layer in whose pages to look first, or nullptr: look everywhere.
  void Begin(std::span<const KvHeadId> heads, const Range& range, const LayerSelection* anchor);

  const Head& head(KvHeadId h) const { return heads_[h.value]; }
  Head& head(KvHeadId h) { return heads_[h.value]; }
  std::span<PageCache> caches() const { return caches_; }
  bool any_missing() const;
  uint32_t pages_max() const;  // of a head's answer, the most
  // Notes the positions in the pages now selected, for the layers whose anchor this is: their
  // questions may be made when this layer's next answer is here already.
  void RememberWhere();

  void FillHead(wire::SelectHead* wanted) override;
  void OnSelection(const wire::HeadSelection& selection,
                   std::vector<wire::ResidentPage>* refetch) override;
  void OnRefetched(KvHeadId head, const wire::PagePayload& page) override;
  Status OnReplyTaken() override;
  Status Settle(std::vector<HeadPages>* damaged) override;

 private:
  const ModelShape shape_;
  const std::span<PageCache> caches_;
  gpu::PageIntake* const intake_;
  AttentionStats* const stats_;
  std::vector<Head> heads_;  // [kv_heads]
  Range range_;
  const LayerSelection* anchor_ = nullptr;
};

}  // namespace icecache
