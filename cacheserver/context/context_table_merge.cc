// Which segments of which chains to merge, and the exchange.
#include <algorithm>

#include "cacheserver/context/context_table.h"
#include "cacheserver/context/merge_plan.h"
#include "common/limits.h"

namespace icecache {
namespace {

// Where the run stands in the chain, as a whole; end() when it does not.
template <typename Chain>
auto FindRun(Chain& chain, std::span<const SegmentId> run) {
  return std::search(chain.begin(), chain.end(), run.begin(), run.end());
}

// Up to where the next segment of a chain starts: what merging would cluster anew.
uint32_t IndexedTokens(const SegmentRecord& segment) { return segment.tail_first - segment.first; }

}  // namespace

uint64_t ContextTable::CopyRoom(TenantId tenant) const {
  uint64_t bytes = 0, copied = 0;
  for (const auto& [id, segment] : segments_) {
    if (segment.tenant != tenant || !segment.sealed) continue;
    bytes += segment.token_bytes * IndexedTokens(segment);
    copied += segment.copied_bytes;
  }
  const uint64_t most = bytes / limits::kMergeCopyShare;
  return most - std::min(most, copied);
}

std::optional<MergeChoice> ContextTable::ChooseMerge(
    uint32_t tokens_max, const std::function<bool(SegmentId last)>& may) const {
  std::optional<MergeChoice> choice;
  std::map<TenantId, uint64_t> rooms;
  std::vector<MergeLink> links;
  for (const auto& [id, record] : contexts_) {
    if (!record.loaded || record.chain.size() < 2) continue;
    links.clear();
    for (const SegmentId segment : record.chain) {
      const SegmentRecord& s = segments_.at(segment);
      auto [room, fresh] = rooms.try_emplace(s.tenant);
      if (fresh) room->second = CopyRoom(s.tenant);
      links.push_back({.tenant = s.tenant,
                       .tokens = s.sealed ? IndexedTokens(s) : 0,
                       .holders = s.references,
                       .may_end = s.sealed && may(segment),
                       .copied_max = room->second / std::max<uint64_t>(1, s.token_bytes)});
    }
    if (choice) continue;  // the others are looked at for `may`, which counts from the first look
    const std::optional<MergeRun> run = PlanMerge(links, tokens_max);
    if (!run) continue;
    const auto begin = record.chain.begin() + run->first;
    choice = MergeChoice{id, {begin, begin + run->count}};
  }
  return choice;
}

std::vector<ContextId> ContextTable::HoldersOf(std::span<const SegmentId> run) const {
  std::vector<ContextId> holders;
  for (const auto& [id, record] : contexts_) {
    if (FindRun(record.chain, run) != record.chain.end()) holders.push_back(id);
  }
  return holders;
}

void ContextTable::Release(SegmentId segment, std::vector<SegmentId>* freed) {
  const auto held = segments_.find(segment);
  KV_CHECK(held != segments_.end() && held->second.references > 0);
  if (--held->second.references > 0) return;
  freed->push_back(segment);
  segments_.erase(held);
}

std::vector<SegmentId> ContextTable::Merge(std::span<const SegmentId> run, SegmentId merged) {
  const SegmentRecord &first = segments_.at(run.front()), &last = segments_.at(run.back());
  SegmentRecord record = last;
  record.first = first.first;
  record.references = 0;
  record.merged = 0;
  uint64_t copied = 0;  // what parts are copies of stays behind, too
  for (const SegmentId segment : run) {
    const SegmentRecord& part = segments_.at(segment);
    KV_CHECK(part.sealed && part.tenant == record.tenant);
    record.merged += std::max(1u, part.merged);
    copied += part.copied_bytes;
  }
  std::vector<SegmentId> freed;
  for (auto& [id, context] : contexts_) {
    const auto at = FindRun(context.chain, run);
    if (at == context.chain.end()) continue;
    ++record.references;
    *at = merged;
    context.chain.erase(at + 1, at + static_cast<ptrdiff_t>(run.size()));
    for (const SegmentId segment : run) Release(segment, &freed);
  }
  KV_CHECK(record.references > 0);
  for (const SegmentId segment : run) {
    const auto kept = segments_.find(segment);
    if (kept == segments_.end()) continue;
    copied += kept->second.token_bytes * IndexedTokens(kept->second) - kept->second.copied_bytes;
  }
  record.copied_bytes = copied;
  segments_.emplace(merged, record);
  return freed;
}

}  // namespace icecache
