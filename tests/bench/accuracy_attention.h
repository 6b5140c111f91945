// Attention through a selection policy in this process, over K and V that a model computed once:
// the same pages, residuals and growth as a cache server's, without the server.
//
// The strict protocol, equal for all policies: every token after the document, the question's too,
// attends to sinks, window and what the policy chose under the budget; a token that leaves the
// window is added to the index before the next selection; no layer is dense unless the method says
// so. Owner's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cacheserver/select/query_energy.h"
#include "kernels/attention.h"
#include "tests/bench/accuracy_document.h"
#include "tests/bench/accuracy_method.h"
#include "tests/support/page_store.h"
#include "worker/attention_exact.h"
#include "worker/attention_full.h"
#include "worker/decode_attention.h"

namespace icecache {

// One head slice: which tokens share a page, and which pages matter.
struct IndexedSlice {
  std::unique_ptr<SelectionPolicy> policy;  // nullptr: follows another layer's (reuse)
  std::unique_ptr<PageStore> store;         // nullptr: a dense layer
  uint32_t first = 0;  // position of token 0 of the store
};

// The indexed part of a document (all but sinks and window) under one method.
struct IndexedDocument {
  std::vector<IndexedSlice> slices;  // [layers, kv_heads]
  double build_ms = 0;
  double index_bytes = 0;
};
Result<IndexedDocument> IndexDocument(const ReadDocument& document, const AccuracyMethod& method,
                                      const SparseBudget& budget);

// What moved and what was looked at, summed over (token, layer, kv head).
struct SelectionStats {
  uint64_t selections = 0;
  uint64_t pages = 0;          // returned
  uint64_t fetched = 0;        // of those, not among the pages that a worker keeps
  uint64_t refetched = 0;      // of those, kept before but changed since
  uint64_t repeated = 0;       // returned by the selection before, too
  uint64_t comparable = 0;     // returned where there was a selection before
  uint64_t fetched_bytes = 0;  // rows of K and V, and residuals
  uint64_t tokens_read = 0;
  // Measured steps only:
  uint64_t probed_pages = 0;
  uint64_t hot_tokens = 0;    // tokens of those pages in some head's exact best 16 * pages
  uint64_t paged_tokens = 0;  // tokens of those pages
};

class PolicyAttention final : public DecodeAttention {
 public:
  // Borrows all. `index` of a forked sequence stays as it is: added tokens have an index of their
  // own, as a fork's segment has. `grow`: they are inserted into `index` itself, which is rebuilt
  // every method.recluster tokens.
  PolicyAttention(ReadDocument& document, IndexedDocument& index, AttentionBackend& backend,
                  const AccuracyMethod& method, const SparseBudget& budget, bool grow);

  // Back to right after the document. REQUIRES: !grow, or nothing was added.
  void Begin();

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return false; }
  const AttentionStats& stats() const override { return stats_; }
  void ResetStats() override {
    stats_ = {};
    selection_stats_ = {};
  }
  uint64_t kv_bytes() const override { return 0; }
  const SelectionStats& selection_stats() const { return selection_stats_; }
  // The next steps compare their pages with the exact best tokens.
  void Probe(bool on) { probe_ = on; }

 private:
  struct Kept {  // a page, chosen or still with the worker
    uint32_t page = 0, fill = 0;
    bool tail = false;
    float log_mass = 0;
  };
  struct Slice {
    IndexedSlice tail;       // of a fork
    std::vector<Kept> kept;  // most recent first
    std::vector<Kept> last;  // the selection before
    uint32_t added = 0;      // since the last build
    QueryEnergy energy;
    bool selected = false;
  };

  Status AddToken(LayerId layer, KvHeadId head);
  Status Rebuild(LayerId layer, KvHeadId head, uint32_t end);
  BuildHints RebuildHints(size_t at) const;
  void Select(LayerId layer, KvHeadId head, const float* queries, const AttentionStateRef& states);
  void Choose(size_t at, size_t head, const SelectRequest& request, const AttentionStateRef& states,
              std::vector<Kept>* chosen);
  void AttendPages(const IndexedSlice& slice, std::span<const PageId> pages, const float* queries,
                   const AttentionStateRef& states);
  void Count(size_t at, const std::vector<Kept>& chosen, const Selection& selection);
  void ProbePages(LayerId layer, KvHeadId head, const float* queries,
                  const std::vector<Kept>& chosen);

  ReadDocument& document_;
  IndexedDocument& index_;
  AttentionBackend& backend_;
  const AccuracyMethod& method_;
  const SparseBudget budget_;
  const bool grow_;
  const uint32_t max_pages_;
  AttentionFull dense_;  // the first method.dense layers
  bool probe_ = false;
  LayerRows token_;
  AttentionStates states_;
  std::vector<Slice> slices_;
  // Of the last layer that chose for itself, [kv_heads]: what followers repeat (reuse).
  std::vector<Selection> leaders_;
  std::vector<InsertPlan> leader_plans_;
  std::vector<PageLayout> leader_layouts_;
  Selection tail_selection_;
  std::vector<float> scores_, sorted_;
  std::vector<PageId> pages_;
  std::vector<std::vector<Kept>> chosen_;  // [kv_heads], by the leader
  AttentionStats stats_;
  SelectionStats selection_stats_;
};

}  // namespace icecache
