// PrefixIndex: which published contexts begin with the tokens of a prompt.
//
// Contexts are found by the keys of their blocks (common/prefix_key.h). A look-up sees the entries of
// one tenant, and those that were shared with all if it asks for them; of others it neither answers
// nor tells that they are there.
//
// A context that has a key has all shorter ones, too, so the longest common prefix is found by
// bisection. Entries are bounded by kPrefixKeysMax; a context beyond is not found, and nothing else.
// Thread: control. Costs: Find O(log keys * log entries); Add and Remove O(keys * log entries).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/ids.h"
#include "common/prefix_key.h"

namespace icecache {

// PrefixKeys(..., end) of a context's tokens.
struct PrefixKeyList {
  std::vector<PrefixKey> keys;
  uint32_t tokens = 0;
  // Of the first `tokens` tokens; nullopt: not at a block's end, nor at the end of all.
  std::optional<PrefixKey> At(uint32_t tokens) const;
};

class PrefixIndex {
 public:
  // False: no room. REQUIRES: not there.
  bool Add(ContextId context, TenantId tenant, bool shared,
           std::shared_ptr<const PrefixKeyList> keys);
  void Remove(ContextId context);  // absent: nothing

  struct Match {
    ContextId context;
    uint32_t tokens = 0;
    PrefixKey key{};
  };
  // keys: of the whole blocks of a prompt. Longest first: ends of contexts within the block behind
  // the last common one, which the caller compares by their keys, then the common blocks. At most
  // kPrefixCandidatesMax, none above `tokens_max`.
  std::vector<Match> Find(TenantId tenant, bool shared, std::span<const PrefixKey> keys,
                          uint32_t tokens_max) const;

  size_t key_count() const { return entries_.size(); }

 private:
  // Tenant, or what stands for all of them.
  using Scope = uint64_t;
  static constexpr Scope kShared = ~Scope{0};
  struct Entry {
    Scope scope;
    PrefixKey key;
    ContextId context;
    friend auto operator<=>(const Entry&, const Entry&) = default;
  };
  struct Known {
    Scope scope;
    std::shared_ptr<const PrefixKeyList> keys;
  };
  bool Has(Scope scope, const PrefixKey& key) const;
  void FindIn(Scope scope, std::span<const PrefixKey> keys, uint32_t tokens_max,
              std::vector<Match>* found) const;

  std::set<Entry> entries_;
  std::unordered_map<ContextId, std::vector<Known>> contexts_;
};

}  // namespace icecache
