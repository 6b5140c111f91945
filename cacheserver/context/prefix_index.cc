#include "cacheserver/context/prefix_index.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"

namespace icecache {

std::optional<PrefixKey> PrefixKeyList::At(uint32_t at) const {
  if (at == 0 || at > tokens || keys.empty()) return std::nullopt;
  if (at == tokens) return keys.back();
  if (at % limits::kPrefixBlockTokens != 0) return std::nullopt;
  return keys[at / limits::kPrefixBlockTokens - 1];
}

bool PrefixIndex::Add(ContextId context, TenantId tenant, bool shared,
                      std::shared_ptr<const PrefixKeyList> keys) {
  const size_t blocks = keys->tokens / limits::kPrefixBlockTokens;
  if (entries_.size() + (shared ? 2 : 1) * blocks > limits::kPrefixKeysMax) return false;
  std::vector<Known>& known = contexts_[context];
  const auto add = [&](Scope scope) {
    for (size_t i = 0; i < blocks; ++i) entries_.insert({scope, keys->keys[i], context});
    known.push_back({scope, keys});
  };
  add(tenant.value);
  if (shared) add(kShared);
  return true;
}

void PrefixIndex::Remove(ContextId context) {
  auto node = contexts_.extract(context);
  if (node.empty()) return;
  for (const Known& known : node.mapped()) {
    const size_t blocks = known.keys->tokens / limits::kPrefixBlockTokens;
    for (size_t i = 0; i < blocks; ++i)
      entries_.erase({known.scope, known.keys->keys[i], context});
  }
}

bool PrefixIndex::Has(Scope scope, const PrefixKey& key) const {
  const auto it = entries_.lower_bound({scope, key, ContextId(0)});
  return it != entries_.end() && it->scope == scope && it->key == key;
}

void PrefixIndex::FindIn(Scope scope, std::span<const PrefixKey> keys, uint32_t tokens_max,
                         std::vector<Match>* found) const {
  keys = keys.first(std::min<size_t>(keys.size(), tokens_max / limits::kPrefixBlockTokens));
  const auto end = std::partition_point(keys.begin(), keys.end(), [&](const PrefixKey& key) {
    return Has(scope, key);
  });
  if (end == keys.begin()) return;
  const auto blocks = static_cast<uint32_t>(end - keys.begin());
  const uint32_t common = blocks * limits::kPrefixBlockTokens;
  const PrefixKey& key = keys[blocks - 1];
  std::optional<Match> block;
  uint32_t looked_at = 0;
  for (auto it = entries_.lower_bound({scope, key, ContextId(0)});
       it != entries_.end() && it->scope == scope && it->key == key; ++it) {
    const PrefixKeyList& list = *contexts_.at(it->context).front().keys;
    // One that ends there needs no cut.
    if (!block || list.tokens == common) block = Match{it->context, common, key};
    const bool in_next_block =
        list.tokens > common && list.tokens - common < limits::kPrefixBlockTokens;
    if (in_next_block && list.tokens <= tokens_max) {
      found->push_back({it->context, list.tokens, list.keys.back()});
    }
    if (++looked_at == 4 * limits::kPrefixCandidatesMax) break;
  }
  found->push_back(*block);
}

std::vector<PrefixIndex::Match> PrefixIndex::Find(TenantId tenant, bool shared,
                                                  std::span<const PrefixKey> keys,
                                                  uint32_t tokens_max) const {
  std::vector<Match> found;
  FindIn(tenant.value, keys, tokens_max, &found);
  if (shared) FindIn(kShared, keys, tokens_max, &found);
  // The tenant's own before another's of the same length.
  std::stable_sort(found.begin(), found.end(),
                   [](const Match& a, const Match& b) { return a.tokens > b.tokens; });
  // The shortest is the one that certainly holds: it stays.
  if (found.size() > limits::kPrefixCandidatesMax) {
    found[limits::kPrefixCandidatesMax - 1] = found.back();
    found.resize(limits::kPrefixCandidatesMax);
  }
  return found;
}

}  // namespace icecache
