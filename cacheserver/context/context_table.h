// ContextTable: the names, chains and flags of all contexts, and who holds which segment.
//
// The shards hold the tokens; this is what the control plane knows. A context is a chain of
// segments of which all but the last are sealed; a fork shares its parent's sealed segments by
// reference count and adds a private one. Names belong to a tenant: no look-up crosses tenants, and
// the name of another tenant's context is as unknown as one that was never there.
//
// Lifecycle of a context: 1. Create | Fork -> 2. MarkSealed -> 3. Publish -> 4. Remove (from any
// state). Thread: control.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cacheserver/context/prefix_index.h"
#include "cacheserver/select/selection_policy.h"
#include "common/ids.h"
#include "common/model_shape.h"
#include "common/status.h"

namespace icecache {

// What Create fixes for a context and all its forks.
struct ContextTraits {
  ModelShape shape;
  std::string model;  // identity of the weights
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint64_t seed = 1;
};

struct ContextRecord {
  ContextId id;
  TenantId tenant;
  std::string name;
  ContextTraits traits;
  std::vector<SegmentId> chain;  // first to last; the last is private until sealed
  bool sealed = false;
  bool published = false;
  uint32_t tokens = 0;       // of the sealed segments of the chain
  uint32_t tail_tokens = 0;  // unindexed rows at the end of the last sealed segment
  SegmentId named_by;        // the last of its chain when it was sealed: names its record on disk
  bool durable = false;      // a record of it is on disk, or on its way there
  bool loaded = true;        // false: the shards do not know it yet; it is in the cold store
  bool shared = false;       // published to all tenants
  std::shared_ptr<const PrefixKeyList> prefix;  // keys of its tokens; nullptr: unknown
  uint64_t prefix_forks = 0, prefix_tokens = 0;  // begun with a match here, and what they saved
};

// Where its tokens are is known once it is sealed.
struct SegmentRecord {
  TenantId tenant;  // whose memory it takes
  bool sealed = false;
  uint32_t first = 0;       // position of its first token
  uint32_t tail_first = 0;  // a child starts here
  uint32_t end = 0;
  uint32_t references = 0;
  uint64_t token_bytes = 0;  // K and V of a token, all layers
  uint32_t merged = 0;       // segments that were put together in it, since the server's start
  uint64_t copied_bytes = 0;  // of those, what stayed with other contexts when it took their place
  uint32_t tokens() const { return end - first; }  // sinks, indexed, tail
};

// Adjacent sealed segments of `context` that are worth being one.
struct MergeChoice {
  ContextId context;
  std::vector<SegmentId> run;  // oldest first
};

// A child and what of its parent's chain it shares: the first `keep` segments, and then, in a fork
// at an earlier token, a cut of the next one: a new sealed segment, record.chain[keep].
struct ForkPlan {
  ContextRecord child;
  uint32_t keep = 0;
  std::optional<SegmentRecord> cut;
};

class ContextTable {
 public:
  // first_segment: larger than any id that was ever used in the cold store.
  explicit ContextTable(uint64_t first_segment = 1) : next_segment_(first_segment) {}

  // An empty name is replaced by "~<id>". INVALID_ARGUMENT for a bad name, shape or window,
  // ALREADY_EXISTS, RESOURCE_EXHAUSTED above kContextsMax.
  Result<ContextRecord> Create(TenantId tenant, std::string name, ContextTraits traits);

  // A child that begins with the parent's first `tokens` tokens (nullopt: all) and grows in a new
  // segment, both on the account of `tenant`. Segments that end by then are shared. OUT_OF_RANGE;
  // FAILED_PRECONDITION when the parent is not sealed; RESOURCE_EXHAUSTED when the chain is at its
  // maximum; the rest as Create.
  Result<ForkPlan> Fork(ContextId parent, std::string name, TenantId tenant,
                        std::optional<uint32_t> tokens = std::nullopt);

  // The last segment is sealed: the chain now holds `tokens`. REQUIRES: present and not sealed.
  void MarkSealed(ContextId id, uint32_t tokens, uint32_t tail_tokens);
  // The same for a fork to which nothing was added: its segment goes, its chain is the parent's.
  void MarkSealedEmpty(ContextId id);
  // What MatchPrefix finds it by once it is published. INVALID_ARGUMENT unless they are as many as
  // its tokens need. REQUIRES: sealed.
  Status SetPrefix(ContextId id, std::vector<PrefixKey> keys);
  // FAILED_PRECONDITION when it is not sealed. Publishing twice is harmless. shared: to all tenants;
  // that is not taken back by a later one.
  Status Publish(ContextId id, bool shared = false);
  // Published contexts that begin with these tokens (PrefixIndex::Find).
  std::vector<PrefixIndex::Match> MatchPrefix(TenantId tenant, bool shared,
                                              std::span<const PrefixKey> keys,
                                              uint32_t tokens_max) const {
    return prefixes_.Find(tenant, shared, keys, tokens_max);
  }
  void CountPrefixFork(ContextId parent, uint32_t tokens);
  // A sealed, published context from the cold store, not loaded. segments[i] describes chain[i].
  // ALREADY_EXISTS, RESOURCE_EXHAUSTED.
  Result<ContextRecord> Recover(ContextRecord record, std::span<const SegmentRecord> segments);
  void SetDurable(ContextId id, bool durable) { contexts_.at(id).durable = durable; }
  void SetLoaded(ContextId id) { contexts_.at(id).loaded = true; }

  // Merging (merge_plan.h; context_table_merge.cc). The first context whose chain is worth it, of those
  // that the shards know; what stays behind in other chains is bounded by kMergeCopyShare of its
  // owner's bytes. `may` is asked of every sealed segment in a chain of several: whether a run may end
  // there. Cost: all chains.
  std::optional<MergeChoice> ChooseMerge(uint32_t tokens_max,
                                         const std::function<bool(SegmentId last)>& may) const;
  SegmentId NewSegmentId() { return SegmentId(next_segment_++); }
  // Contexts whose chains hold the whole run, ascending.
  std::vector<ContextId> HoldersOf(std::span<const SegmentId> run) const;
  // Puts `merged` in the place of the run in all those chains; there is at least one. Answers with the
  // segments that nobody holds any more.
  std::vector<SegmentId> Merge(std::span<const SegmentId> run, SegmentId merged);

  // Takes the context out; its segments live on while other chains hold them. Answers with those
  // that nobody holds any more; nullopt: it was not there.
  std::optional<std::vector<SegmentId>> Remove(ContextId id);

  // Valid until the next call that changes the table.
  const ContextRecord* Find(ContextId id) const;
  const ContextRecord* FindByName(TenantId tenant, std::string_view name) const;
  std::vector<ContextRecord> List(TenantId tenant) const;  // by name
  std::vector<ContextRecord> ListAll() const;              // by tenant, then name
  std::optional<SegmentRecord> FindSegment(SegmentId id) const;

  uint32_t count() const { return static_cast<uint32_t>(contexts_.size()); }
  uint32_t segment_count() const { return static_cast<uint32_t>(segments_.size()); }

  // INTERNAL naming the first broken invariant: reference counts equal the chains, names are
  // unique. For tests.
  Status Validate() const;

 private:
  Result<ContextRecord> Insert(ContextRecord record, const std::optional<SegmentRecord>& cut = {});
  void PlanFork(const ContextRecord& parent, uint32_t tokens, ForkPlan* plan) const;
  uint64_t CopyRoom(TenantId tenant) const;
  void Release(SegmentId segment, std::vector<SegmentId>* freed);

  uint64_t next_context_ = 1;
  uint64_t next_segment_;
  std::map<ContextId, ContextRecord> contexts_;
  std::map<std::pair<TenantId, std::string>, ContextId> names_;
  std::unordered_map<SegmentId, SegmentRecord> segments_;
  PrefixIndex prefixes_;  // of published contexts
};

}  // namespace icecache
