#include "cacheserver/context/context_table.h"

#include <algorithm>

#include "common/limits.h"

namespace icecache {
namespace {

Status CheckName(const std::string& name) {
  if (name.size() > limits::kContextNameBytesMax) {
    return InvalidArgument("context name of " + std::to_string(name.size()) + " bytes; at most " +
                           std::to_string(limits::kContextNameBytesMax));
  }
  // Names go into logs, tables and JSON: no control characters. Bytes above 127 (UTF-8) are fine.
  const bool control = std::any_of(name.begin(), name.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  if (control) return InvalidArgument("context name holds a control character");
  return OkStatus();
}

Status CheckTraits(const ContextTraits& traits) {
  KV_RETURN_IF_ERROR(traits.shape.Validate());
  if (traits.shape.head_dim < PolicyHeadDimMin(traits.policy)) {
    return InvalidArgument("head_dim " + std::to_string(traits.shape.head_dim) + " with policy " +
                           std::string(PolicyKindName(traits.policy)) + "; expected at least " +
                           std::to_string(PolicyHeadDimMin(traits.policy)) + ", or another policy");
  }
  if (traits.sink_tokens > limits::kSinkTokensMax) {
    return InvalidArgument("sink_tokens " + std::to_string(traits.sink_tokens) + "; at most " +
                           std::to_string(limits::kSinkTokensMax));
  }
  if (traits.window_tokens > limits::kWindowTokensMax) {
    return InvalidArgument("window_tokens " + std::to_string(traits.window_tokens) + "; at most " +
                           std::to_string(limits::kWindowTokensMax));
  }
  return OkStatus();
}

}  // namespace

Result<ContextRecord> ContextTable::Insert(ContextRecord record,
                                           const std::optional<SegmentRecord>& cut) {
  KV_RETURN_IF_ERROR(CheckName(record.name));
  if (contexts_.size() >= limits::kContextsMax) {
    return ResourceExhausted("the server holds " + std::to_string(contexts_.size()) +
                             " contexts, its maximum; drop some");
  }
  record.id = ContextId(next_context_);
  if (record.name.empty()) record.name = "~" + std::to_string(record.id.value);
  if (names_.contains({record.tenant, record.name})) {
    return AlreadyExists(
        "context '" + record.name +
        "' exists; drop it first, choose another name, or open it if it is published");
  }
  ++next_context_;
  if (cut) {
    record.chain.push_back(NewSegmentId());
    segments_.emplace(record.chain.back(), *cut);
  }
  const SegmentId tail = NewSegmentId();
  record.chain.push_back(tail);
  SegmentRecord grows;
  grows.tenant = record.tenant;
  grows.first = record.tokens - record.tail_tokens;
  grows.token_bytes = record.traits.shape.token_bytes();
  segments_.emplace(tail, grows);
  for (SegmentId segment : record.chain) ++segments_.at(segment).references;
  names_.emplace(std::pair(record.tenant, record.name), record.id);
  contexts_.emplace(record.id, record);
  return record;
}

Result<ContextRecord> ContextTable::Create(TenantId tenant, std::string name,
                                           ContextTraits traits) {
  KV_RETURN_IF_ERROR(CheckTraits(traits));
  ContextRecord record;
  record.tenant = tenant;
  record.name = std::move(name);
  record.traits = std::move(traits);
  return Insert(std::move(record));
}

// A segment that ends at the token ends the shared part, tail and all. Else the segment that holds
// the first token of the child's window is cut there.
void ContextTable::PlanFork(const ContextRecord& parent, uint32_t tokens, ForkPlan* plan) const {
  const uint32_t sinks = std::min(parent.traits.sink_tokens, tokens);
  const uint32_t tail_first = std::max(sinks, tokens - std::min(tokens, parent.traits.window_tokens));
  SegmentRecord cut;
  for (size_t i = 0; i < parent.chain.size(); ++i) {
    const SegmentRecord& segment = segments_.at(parent.chain[i]);
    if (segment.end == tokens) {
      plan->keep = static_cast<uint32_t>(i) + 1;
      plan->cut.reset();
      plan->child.tail_tokens = tokens - segment.tail_first;
      return;
    }
    if (segment.first > tail_first) continue;
    plan->keep = static_cast<uint32_t>(i);
    cut.first = segment.first;
  }
  cut.tenant = plan->child.tenant;
  cut.token_bytes = parent.traits.shape.token_bytes();
  cut.sealed = true;
  cut.tail_first = tail_first;
  cut.end = tokens;
  plan->cut = cut;
  plan->child.tail_tokens = tokens - tail_first;
}

Result<ForkPlan> ContextTable::Fork(ContextId parent_id, std::string name, TenantId tenant,
                                    std::optional<uint32_t> tokens) {
  const ContextRecord* parent = Find(parent_id);
  if (parent == nullptr) return NotFound("context " + std::to_string(parent_id.value) + " is gone");
  if (!parent->sealed) {
    return FailedPrecondition("context '" + parent->name +
                              "' is not sealed; seal it before it is forked");
  }
  // Sinks are the chain's for good: a child keeps them all.
  const uint32_t least = std::max(1u, std::min(parent->traits.sink_tokens, parent->tokens));
  if (tokens && (*tokens < least || *tokens > parent->tokens)) {
    return OutOfRange("fork at token " + std::to_string(*tokens) + ": context '" + parent->name +
                      "' can be forked at " + std::to_string(least) + " to " +
                      std::to_string(parent->tokens));
  }
  ForkPlan plan;
  ContextRecord& record = plan.child;
  record.tenant = tenant;
  record.name = std::move(name);
  record.traits = parent->traits;
  record.tokens = tokens.value_or(parent->tokens);
  plan.keep = static_cast<uint32_t>(parent->chain.size());
  record.tail_tokens = parent->tail_tokens;
  if (record.tokens < parent->tokens) PlanFork(*parent, record.tokens, &plan);
  if (plan.keep + (plan.cut ? 1 : 0) >= limits::kSegmentsPerContextMax) {
    return ResourceExhausted("context '" + parent->name + "' has " +
                             std::to_string(parent->chain.size()) +
                             " segments, the maximum of a chain; fork an earlier one");
  }
  record.chain.assign(parent->chain.begin(), parent->chain.begin() + plan.keep);
  KV_ASSIGN_OR_RETURN(record, Insert(std::move(record), plan.cut));
  return plan;
}

void ContextTable::MarkSealed(ContextId id, uint32_t tokens, uint32_t tail_tokens) {
  ContextRecord& record = contexts_.at(id);
  KV_CHECK(!record.sealed);
  SegmentRecord& segment = segments_.at(record.chain.back());
  KV_CHECK(!segment.sealed && segment.references == 1);
  // The child's segment starts at its parent's first tail position, so the tail counts once, in the
  // child.
  KV_CHECK(tokens >= segment.first && tail_tokens <= tokens - segment.first);
  segment.sealed = true;
  segment.end = tokens;
  segment.tail_first = tokens - tail_tokens;
  record.sealed = true;
  record.named_by = record.chain.back();
  record.tokens = tokens;
  record.tail_tokens = tail_tokens;
}

void ContextTable::MarkSealedEmpty(ContextId id) {
  ContextRecord& record = contexts_.at(id);
  KV_CHECK(!record.sealed && record.chain.size() > 1);
  const auto segment = segments_.find(record.chain.back());
  KV_CHECK(segment != segments_.end() && segment->second.references == 1);
  segments_.erase(segment);
  record.chain.pop_back();
  record.sealed = true;
  record.named_by = record.chain.back();
}

Status ContextTable::SetPrefix(ContextId id, std::vector<PrefixKey> keys) {
  ContextRecord& record = contexts_.at(id);
  KV_CHECK(record.sealed);
  if (keys.empty() || record.published) return OkStatus();
  if (keys.size() != PrefixKeyCount(record.tokens)) {
    return InvalidArgument("seal: " + std::to_string(keys.size()) + " keys for " +
                           std::to_string(record.tokens) + " tokens, expected " +
                           std::to_string(PrefixKeyCount(record.tokens)));
  }
  record.prefix =
      std::make_shared<const PrefixKeyList>(PrefixKeyList{std::move(keys), record.tokens});
  return OkStatus();
}

void ContextTable::CountPrefixFork(ContextId parent, uint32_t tokens) {
  ContextRecord& record = contexts_.at(parent);
  ++record.prefix_forks;
  record.prefix_tokens += tokens;
}

Status ContextTable::Publish(ContextId id, bool shared) {
  auto it = contexts_.find(id);
  if (it == contexts_.end()) return NotFound("context " + std::to_string(id.value) + " is gone");
  ContextRecord& record = it->second;
  if (!record.sealed) {
    return FailedPrecondition("context '" + record.name +
                              "' is not sealed; seal it before it is published");
  }
  record.published = true;
  record.shared |= shared;
  if (record.prefix == nullptr) return OkStatus();
  prefixes_.Remove(id);
  (void)prefixes_.Add(id, record.tenant, record.shared, record.prefix);
  return OkStatus();
}

Result<ContextRecord> ContextTable::Recover(ContextRecord record,
                                            std::span<const SegmentRecord> segments) {
  KV_RETURN_IF_ERROR(CheckName(record.name));
  KV_RETURN_IF_ERROR(CheckTraits(record.traits));
  KV_CHECK(!record.chain.empty() && segments.size() == record.chain.size());
  if (contexts_.size() >= limits::kContextsMax) {
    return ResourceExhausted("the server holds " + std::to_string(contexts_.size()) +
                             " contexts, its maximum");
  }
  if (names_.contains({record.tenant, record.name})) {
    return AlreadyExists("context '" + record.name + "' is there twice");
  }
  record.id = ContextId(next_context_++);
  record.sealed = record.published = record.durable = true;
  record.loaded = false;
  record.tokens = segments.back().end;
  record.tail_tokens = segments.back().end - segments.back().tail_first;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [it, fresh] = segments_.try_emplace(record.chain[i], segments[i]);
    it->second.sealed = true;
    it->second.token_bytes = record.traits.shape.token_bytes();
    it->second.references = fresh ? 1 : it->second.references + 1;
  }
  names_.emplace(std::pair(record.tenant, record.name), record.id);
  contexts_.emplace(record.id, record);
  if (record.prefix) (void)prefixes_.Add(record.id, record.tenant, record.shared, record.prefix);
  return record;
}

std::optional<std::vector<SegmentId>> ContextTable::Remove(ContextId id) {
  auto it = contexts_.find(id);
  if (it == contexts_.end()) return std::nullopt;
  std::vector<SegmentId> freed;
  for (SegmentId segment : it->second.chain) Release(segment, &freed);
  names_.erase({it->second.tenant, it->second.name});
  prefixes_.Remove(id);
  contexts_.erase(it);
  return freed;
}

const ContextRecord* ContextTable::Find(ContextId id) const {
  auto it = contexts_.find(id);
  return it == contexts_.end() ? nullptr : &it->second;
}

const ContextRecord* ContextTable::FindByName(TenantId tenant, std::string_view name) const {
  auto it = names_.find({tenant, std::string(name)});
  return it == names_.end() ? nullptr : &contexts_.at(it->second);
}

std::vector<ContextRecord> ContextTable::List(TenantId tenant) const {
  std::vector<ContextRecord> records;
  for (auto it = names_.lower_bound({tenant, ""}); it != names_.end(); ++it) {
    if (it->first.first != tenant) break;
    records.push_back(contexts_.at(it->second));
  }
  return records;
}

std::vector<ContextRecord> ContextTable::ListAll() const {
  std::vector<ContextRecord> records;
  for (const auto& [key, id] : names_) records.push_back(contexts_.at(id));
  return records;
}

std::optional<SegmentRecord> ContextTable::FindSegment(SegmentId id) const {
  auto it = segments_.find(id);
  if (it == segments_.end()) return std::nullopt;
  return it->second;
}

Status ContextTable::Validate() const {
  std::unordered_map<SegmentId, uint32_t> references;
  for (const auto& [id, record] : contexts_) {
    auto name = names_.find({record.tenant, record.name});
    if (name == names_.end() || name->second != id) {
      return Internal("context '" + record.name + "' is not found under its name");
    }
    if (record.chain.empty()) return Internal("context '" + record.name + "' has no segment");
    if (record.published && !record.sealed) {
      return Internal("context '" + record.name + "' is published and not sealed");
    }
    for (size_t i = 0; i < record.chain.size(); ++i) {
      ++references[record.chain[i]];
      auto segment = segments_.find(record.chain[i]);
      if (segment == segments_.end())
        return Internal("context '" + record.name + "': segment missing");
      const bool last = i + 1 == record.chain.size();
      if (segment->second.sealed != (!last || record.sealed)) {
        return Internal("context '" + record.name + "': segment " + std::to_string(i) +
                        " has the wrong sealed flag");
      }
    }
  }
  if (names_.size() != contexts_.size()) return Internal("more names than contexts");
  if (references.size() != segments_.size()) return Internal("a segment that no chain holds");
  for (const auto& [id, count] : references) {
    if (segments_.at(id).references != count) {
      return Internal("segment " + std::to_string(id.value) + " has a wrong reference count");
    }
  }
  return OkStatus();
}

}  // namespace icecache
