// Context: the part of a context that one shard owns: a chain of sealed Segments and, until it is
// sealed itself, a private segment at its end that grows.
//
// Knows nothing of leases, epochs and names: the services fence requests before they come here.
// The layer and heads of every call must be the shard's (INVALID_ARGUMENT otherwise).
//
// A decode step: Append, Select for each head, answer, then IndexPending.
// Thread: the shard's. Jobs run anywhere and come back to Install.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cacheserver/context/chain_rows.h"
#include "cacheserver/context/misses.h"
#include "cacheserver/context/segment.h"
#include "common/wire/data_codec.h"
#include "kernels/attention.h"

namespace icecache {

struct ContextSpec {
  ContextId id;
  SegmentId segment;  // of the private segment; the same on all shards, never used before
  TenantId tenant;
  ModelShape shape;
  uint32_t sink_tokens = 4;
  uint32_t window_tokens = 64;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint64_t seed = 1;
  ShardId shard;
  uint32_t shard_count = 1;
};

// What the shard holds for a context. Shared segments are counted in full by every context of the
// chain.
struct ContextUsage {
  uint32_t segments = 0;
  uint32_t tokens = 0;  // end of the longest slice: positions held by the chain
  uint64_t pages = 0;
  uint64_t indexed_tokens = 0;    // summed over slices
  uint64_t pending_tokens = 0;    // summed over slices
  uint64_t kv_bytes = 0;          // frames and row buffers
  uint64_t private_kv_bytes = 0;  // of those, in the context's own segment
  uint64_t index_bytes = 0;
};

// A selection against attention over everything that is indexed or pending; what the worker itself
// holds (sinks, window) has no part in it. Means over the query heads of the group.
struct SelectionCheck {
  float mass = 0;          // true share of the attention mass that the returned pages hold, 0 to 1
  float output_error = 0;  // |pages and residual - exact| / |exact|
};

// How a selection is answered, beyond what policies are asked.
struct AnswerOptions {
  // Pages that the worker lacks wholly or in part are attended to here, exactly, and join the
  // residual (which then is never empty).
  bool attend_missing = false;
  // A page that has grown comes whole: what the worker has of it may be a lossy copy.
  bool whole_pages = false;
  // Positions of tokens that probably matter, for SelectRequest::near of large segments.
  std::span<const uint32_t> near{};
};

class Context {
 public:
  // `pool` and `attention` are the shard's and outlive the context. INVALID_ARGUMENT: shape, sizes
  // or ids out of limits.
  static Result<std::unique_ptr<Context>> Create(const ContextSpec& spec, PagePool& pool,
                                                 AttentionBackend& attention);
  // A context whose chain is the parent's and a new private segment that starts at the parent's
  // first tail position. spec's shape, shard, sink and window sizes must be the parent's. Cost:
  // O(slices), nothing is copied. FAILED_PRECONDITION when the parent is not sealed;
  // RESOURCE_EXHAUSTED: chain too long.
  static Result<std::unique_ptr<Context>> Fork(const Context& parent, const ContextSpec& spec);
  // The same behind any sealed segments that join, oldest first, of spec's shape and shard.
  static Result<std::unique_ptr<Context>> Grow(const ContextSpec& spec,
                                               std::vector<std::shared_ptr<const Segment>> chain,
                                               PagePool& pool, AttentionBackend& attention);
  // A sealed context of these segments, all sealed, oldest first, not empty.
  static std::unique_ptr<Context> Restore(const ContextSpec& spec,
                                          std::vector<std::shared_ptr<const Segment>> chain,
                                          PagePool& pool, AttentionBackend& attention);

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // See HeadSlice for all of these; errors name the slice. FAILED_PRECONDITION on a sealed context.
  // k and v: [token_count, head_dim] in the shape's dtype.
  Status PutRows(LayerId layer, KvHeadId head, uint32_t first, uint32_t token_count,
                 std::span<const std::byte> k, std::span<const std::byte> v);
  // nullptr: this build stands already; answer at once. Sinks are split off in the first segment of
  // a chain only. query_energy: [head_dim] or empty.
  Result<std::unique_ptr<SliceJob>> PrepareBuild(LayerId layer, KvHeadId head, uint32_t token_count,
                                                 std::span<const float> query_energy,
                                                 std::shared_ptr<const Packing> proposed = nullptr);
  Result<std::unique_ptr<SliceJob>> PrepareRecluster(LayerId layer, KvHeadId head);
  bool WantsRecluster(LayerId layer, KvHeadId head) const;
  Status PrepareInstall(LayerId layer, KvHeadId head, SliceJob& job);
  Status Install(LayerId layer, KvHeadId head, std::unique_ptr<SliceJob> job);

  Status Append(LayerId layer, KvHeadId head, uint32_t first, uint32_t token_count,
                std::span<const std::byte> k, std::span<const std::byte> v);
  // True: more is pending in the slice.
  Result<bool> IndexPending(LayerId layer, KvHeadId head, uint32_t max_tokens);

  // One ranking over the chain under one budget. Fills head, pages (spans into the frames for the
  // rows that the worker lacks: K rows, V rows, positions of [from, fill)), residual, covered_mass
  // What is not in memory is added to *misses; while there is any, *out is undefined: bring it and
  // ask again. With everything in memory, the answer does not depend on what was not before.
  // and tokens_read of *out, reusing its memory. The spans hold while a PagePool::Pin() taken after
  // the call and before the next change lives.
  Status Select(LayerId layer, KvHeadId head, const SelectRequest& request,
                std::span<const wire::ResidentPage> resident, wire::HeadSelection* out,
                Misses* misses, const AnswerOptions& options = {}) const;
  // How good an answer was. REQUIRES: `selection` is what Select has just answered to these queries,
  // and nothing has changed since. nullopt: nothing is indexed, something of it is not in memory, or
  // it is more than limits::kCheckTokensMax. Cost: exact attention over the slice's rows, so ask for
  // samples only.
  Result<std::optional<SelectionCheck>> CheckSelection(LayerId layer, KvHeadId head,
                                                       const float* queries,
                                                       const wire::HeadSelection& selection) const;
  // What a Select asked, so that the private segment is clustered for such queries.
  void ObserveQueries(LayerId layer, KvHeadId head, const float* queries);
  // Whole pages by name; those that no longer stand under that name are left out. log_mass is 0.
  Status FetchPages(LayerId layer, KvHeadId head, std::span<const wire::ResidentPage> names,
                    wire::HeadSelection* out, Misses* misses) const;
  // Sinks of the chain's first segment; live tail of its last sealed segment (the window a fork
  // starts with), or when nothing is sealed yet the tail of the private one.
  Result<RowsView> FetchRows(LayerId layer, KvHeadId head, wire::RowsPart part) const;

  // Rows [range.first, + range.count) wherever they are (chain_rows.h).
  Status ReadRows(LayerId layer, KvHeadId head, const RowRange& range, Misses* misses) const;

  // Seals the private segment; that of a fork to which nothing was added goes, and the context is
  // its parent's chain under another name. Harmless when sealed.
  Status Seal();
  bool sealed() const { return tail_ == nullptr; }
  // Of the last sealed segment; nullopt when nothing is sealed or the shard owns no slice.
  std::optional<SegmentEnds> sealed_ends() const;
  // Position of the next Append to the slice; of a sealed context, the first tail position.
  Result<uint32_t> NextPosition(LayerId layer, KvHeadId head) const;

  // Puts `merged`, which holds the same tokens, in place of what the chain holds from segment `first`
  // to `last`. False: it does not hold both, and nothing has changed. Selections that are under way
  // elsewhere keep what they read.
  bool ReplaceRun(SegmentId first, SegmentId last, const std::shared_ptr<const Segment>& merged) {
    return ReplaceLinks(&chain_, first, last, merged);
  }
  static bool ReplaceLinks(std::vector<std::shared_ptr<const Segment>>* chain, SegmentId first,
                           SegmentId last, const std::shared_ptr<const Segment>& merged);

  const ContextSpec& spec() const { return spec_; }
  const std::vector<std::shared_ptr<const Segment>>& chain() const { return chain_; }
  size_t segment_count() const { return chain_.size() + (tail_ ? 1 : 0); }
  ContextUsage usage() const;  // walks all slices
  PagePool& pool() const { return pool_; }
  // Slices with pending rows or due for re-clustering, for the shard's idle time.
  void VisitPrivateSlices(const Segment::SliceVisitor& visit) const;
  // Segments of the chain, oldest first, the private one last.
  template <typename Visit>
  void VisitSegments(const Visit& visit) const {
    for (const std::shared_ptr<const Segment>& segment : chain_) visit(*segment);
    if (tail_) visit(std::as_const(*tail_));
  }
  // Pages of the slice in the last segment; 0 when the shard does not own it.
  uint32_t PageCount(LayerId layer, KvHeadId head) const {
    const Segment* last = tail_ ? tail_.get() : chain_.back().get();
    const HeadSlice* slice = last->slice(layer, head);
    return slice == nullptr ? 0 : slice->page_count();
  }
  Status Validate() const;

 private:
  Context(const ContextSpec& spec, PagePool& pool, AttentionBackend& attention);

  bool AddedNothing() const;
  Status CheckSlice(LayerId layer, KvHeadId head) const;
  void ListLinks(LayerId layer, KvHeadId head, Misses* misses) const;
  Result<HeadSlice*> MutableSlice(LayerId layer, KvHeadId head);

  const ContextSpec spec_;
  PagePool& pool_;
  AttentionBackend& attention_;
  std::vector<std::shared_ptr<const Segment>> chain_;  // sealed, oldest first
  std::shared_ptr<Segment> tail_;                      // private; nullptr once sealed
};

}  // namespace icecache
