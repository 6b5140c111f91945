#include "worker/layer_selection.h"

#include <algorithm>

#include "kernels/gpu/page_intake.h"

namespace icecache {
namespace {

void CountDamaged(const PageCache::Damaged& damaged, AttentionStats* stats) {
  switch (damaged.from) {
    case PageCache::From::kMessage:
      ++stats->bad_pages;
      break;
    case PageCache::From::kMapped:
      ++stats->mapped_gone;
      break;
    case PageCache::From::kWorker:
      --stats->worker_pages;
      ++(damaged.replaced ? stats->worker_replaced : stats->worker_damaged);
      break;
  }
}

}  // namespace

void LayerSelection::Begin(std::span<const KvHeadId> heads, const Range& range,
                           const LayerSelection* anchor) {
  range_ = range;
  anchor_ = anchor;
  for (const KvHeadId h : heads) {
    Head& head = heads_[h.value];
    head.arrived = false;
    head.residual.clear();
    head.missing.clear();
    if (!caches_.empty()) caches_[h.value].DropUnsettled();
  }
}

bool LayerSelection::any_missing() const {
  return std::any_of(heads_.begin(), heads_.end(),
                     [](const Head& head) { return !head.missing.empty(); });
}

uint32_t LayerSelection::pages_max() const {
  uint32_t pages = 0;
  for (const Head& head : heads_) pages = std::max(pages, head.arrived ? head.page_count : 0);
  return pages;
}

void LayerSelection::FillHead(wire::SelectHead* wanted) {
  if (caches_.empty()) return;
  caches_[wanted->head.value].ListResident(&wanted->resident);
  if (anchor_ != nullptr) wanted->near = anchor_->head(wanted->head).where;
}

void LayerSelection::RememberWhere() {
  for (uint16_t h = 0; h < caches_.size(); ++h) {
    std::vector<uint32_t>& where = heads_[h].where;
    where.clear();  // stays so in reply mode "attend", which leaves nothing to go by
    caches_[h].ListSelectedPositions(&where);
    if (where.size() > limits::kNearPositionsMax) where.resize(limits::kNearPositionsMax);
  }
}

void LayerSelection::OnSelection(const wire::HeadSelection& selection,
                                 std::vector<wire::ResidentPage>* refetch) {
  Head& head = heads_[selection.head.value];
  head.arrived = true;
  head.covered_end = range_.covered_end;
  head.residual = selection.residual;
  head.page_count = static_cast<uint32_t>(selection.pages.size());
  for (const wire::PagePayload& page : selection.pages) {
    if (page.place != wire::PagePlace::kAttended) continue;
    ++stats_->remote_pages;
    stats_->attended_tokens += uint64_t{page.fill} * shape_.group();
  }
  if (caches_.empty()) return;
  PageCache& pages = caches_[selection.head.value];
  pages.BeginStep();
  const auto count = [&](const wire::PagePayload& page, PageCache::Outcome outcome) {
    switch (outcome) {
      case PageCache::Outcome::kHit:
        ++stats_->page_hits;
        break;
      case PageCache::Outcome::kReceived:
        ++stats_->page_misses;
        if (page.place == wire::PagePlace::kMapped) ++stats_->mapped_pages;
        if (page.place == wire::PagePlace::kPushed) ++stats_->pushed_pages;
        if (page.coded_bytes > 0) ++stats_->coded_pages;
        if (page.from > 0) ++stats_->grown_pages;
        break;
      case PageCache::Outcome::kTaken:
        ++stats_->page_misses;
        ++stats_->worker_pages;
        break;
      case PageCache::Outcome::kMissed:
        ++stats_->worker_missed;
        head.missing.push_back({page.segment, page.page, page.version, page.fill});
        break;
      case PageCache::Outcome::kBad:
        // A frame may have been reused between the reply and the copy: nothing is broken then.
        ++(page.place == wire::PagePlace::kMapped ? stats_->mapped_gone : stats_->bad_pages);
        head.missing.push_back({page.segment, page.page, page.version, page.fill});
        break;
      case PageCache::Outcome::kRepeated:
        ++stats_->bad_pages;
        break;
    }
  };
  pages.ApplyAll(selection.pages, range_.indexed_begin, range_.indexed_end, count);
  *refetch = head.missing;
}

void LayerSelection::OnRefetched(KvHeadId head, const wire::PagePayload& page) {
  auto& missing = heads_[head.value].missing;
  const auto wanted = std::find_if(missing.begin(), missing.end(), [&](const auto& m) {
    return m.segment == page.segment && m.page == page.page;
  });
  if (wanted == missing.end()) return;
  // Another version has other rows than those which the selection left to this page. More rows than
  // then were pending at that time, and in the residual.
  if (page.version != wanted->version || page.fill < wanted->fill || page.from != 0) return;
  const auto outcome =
      caches_[head.value].Apply(page, range_.indexed_begin, range_.indexed_end, wanted->fill);
  if (outcome == PageCache::Outcome::kReceived) {
    ++stats_->page_misses;
    missing.erase(wanted);
  } else {
    ++stats_->bad_pages;
  }
}

Status LayerSelection::OnReplyTaken() { return intake_ == nullptr ? OkStatus() : intake_->Flush(); }

Status LayerSelection::Settle(std::vector<HeadPages>* damaged) {
  std::vector<PageCache::Damaged> found;
  for (uint16_t h = 0; h < caches_.size(); ++h) {
    found.clear();
    KV_RETURN_IF_ERROR(caches_[h].Settle(&found));
    if (found.empty()) continue;
    HeadPages& pages = damaged->emplace_back(HeadPages{KvHeadId(h), {}});
    for (const PageCache::Damaged& d : found) {
      --stats_->page_misses;
      CountDamaged(d, stats_);
      pages.pages.push_back(d.page);
      heads_[h].missing.push_back(d.page);
    }
  }
  return OkStatus();
}

}  // namespace icecache
