#include "worker/page_cache.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "common/checksum.h"
#include "common/status.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/int8_rows.h"

namespace icecache {

PageCache::PageCache(const ModelShape& shape, uint32_t capacity_pages, PageArena& arena,
                     PageSharing* sharing, uint32_t slice)
    : shape_(shape), capacity_(capacity_pages), arena_(arena), sharing_(sharing), slice_(slice) {
  KV_CHECK(capacity_pages > 0);
}

PageCache::~PageCache() {
  for (Slot& slot : slots_) Withdraw(&slot);
}

std::byte* PageCache::v_rows(const Slot& slot) const {
  return slot.frame + limits::kPageTokens * shape_.row_bytes();
}

void PageCache::ListResident(std::vector<wire::ResidentPage>* pages) {
  for (const Slot& slot : slots_) {
    if (slot.fill == 0 || slot.ticket != 0) continue;
    pages->push_back({SegmentId(slot.key.segment), PageId(slot.key.page), slot.version, slot.fill});
  }
  offers_.clear();
  // A page that this worker has no frame for on the device could not be copied there.
  if (sharing_ == nullptr || arena_.intake().host_frames()) return;
  sharing_->List(slice_, segments_, &offers_);
  std::erase_if(offers_, [this](const PageSharing::Offer& offer) {
    return slot_of_.contains({offer.page.segment.value, offer.page.page.value});
  });
  const size_t room =
      limits::kPagesPerSelectMax - std::min<size_t>(pages->size(), limits::kPagesPerSelectMax);
  if (offers_.size() > room) offers_.resize(room);
  for (const PageSharing::Offer& offer : offers_) pages->push_back(offer.page);
}

void PageCache::BeginStep() {
  for (const PageId id : selected_) {
    slots_[id.value].pinned = false;
    views_[id.value].fill = slots_[id.value].fill;
  }
  selected_.clear();
  DropUnsettled();
}

void PageCache::DropUnsettled() {
  for (const uint32_t index : unsettled_) {
    if (slots_[index].ticket != 0) Discard(index);
  }
  unsettled_.clear();
}

// Although it was selected in this step.
void PageCache::Discard(uint32_t index) {
  std::erase(selected_, PageId(index));
  slots_[index].pinned = false;
  Drop(index);
}

Status PageCache::Settle(std::vector<Damaged>* damaged) {
  if (unsettled_.empty()) return OkStatus();
  KV_RETURN_IF_ERROR(arena_.intake().Settle(slots_[unsettled_.back()].ticket));
  for (const uint32_t index : unsettled_) {
    Slot& slot = slots_[index];
    const uint64_t ticket = std::exchange(slot.ticket, 0);
    if (ticket == 0) continue;
    const bool replaced = slot.from == From::kWorker && !sharing_->Unchanged(slot.place);
    if (!replaced && arena_.intake().intact(ticket)) {
      Publish(&slot);
      continue;
    }
    damaged->push_back(
        {{SegmentId(slot.key.segment), PageId(slot.key.page), slot.version, slot.fill},
         slot.from,
         replaced});
    Discard(index);
  }
  unsettled_.clear();
  return OkStatus();
}

void PageCache::RetainSegments(std::span<const SegmentId> segments) {
  BeginStep();
  segments_.assign(segments.begin(), segments.end());
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    const SegmentId segment(slots_[i].key.segment);
    const bool kept = std::find(segments.begin(), segments.end(), segment) != segments.end();
    if (slots_[i].fill > 0 && !kept) Drop(i);
  }
}

void PageCache::Drop(uint32_t index) {
  Slot& slot = slots_[index];
  Withdraw(&slot);
  slot_of_.erase(slot.key);
  slot.fill = 0;
  slot.ticket = 0;
  views_[index] = PageView{};
  free_slots_.push_back(index);
}

void PageCache::Publish(Slot* slot) {
  if (sharing_ == nullptr || slot->lossy) return;
  DirectoryPage page{SegmentId(slot->key.segment), PageId(slot->key.page), slot->version,
                     slot->fill};
  page.checksum = slot->checksum;
  std::memcpy(page.positions, slot->positions, sizeof(page.positions));
  slot->entry = sharing_->Publish(slice_, slot->frame, page);
}

// Before its frame is written to.
void PageCache::Withdraw(Slot* slot) {
  if (slot->entry.has_value()) sharing_->Withdraw(*slot->entry);
  slot->entry.reset();
}

uint32_t PageCache::TakeSlot() {
  if (free_slots_.empty() && slots_.size() < capacity_) {
    Slot& slot = slots_.emplace_back();
    slot.frame = arena_.Allocate();
    slot.on_device = arena_.on_device(slot.frame);
    views_.emplace_back();
    free_slots_.push_back(static_cast<uint32_t>(slots_.size() - 1));
  }
  if (free_slots_.empty()) {
    KV_CHECK(selected_.size() < slots_.size());
    for (uint32_t i = 0; i < 2 * slots_.size() && free_slots_.empty(); ++i) {
      Slot& slot = slots_[hand_];
      if (!slot.pinned && !slot.recent) Drop(hand_);
      if (!slot.pinned) slot.recent = false;
      hand_ = (hand_ + 1) % static_cast<uint32_t>(slots_.size());
    }
  }
  KV_CHECK(!free_slots_.empty());
  const uint32_t index = free_slots_.back();
  free_slots_.pop_back();
  return index;
}

bool PageCache::PlaceRows(const wire::PagePayload& page, const Slot& slot) const {
  const size_t row_bytes = shape_.row_bytes();
  std::memcpy(k_rows(slot) + page.from * row_bytes, page.k_rows.data(), page.k_rows.size());
  std::memcpy(v_rows(slot) + page.from * row_bytes, page.v_rows.data(), page.v_rows.size());
  return page.checksum == PageChecksum({page.segment.value, page.page.value, page.version},
                                       {k_rows(slot), page.fill * row_bytes},
                                       {v_rows(slot), page.fill * row_bytes},
                                       positions(slot, page.fill));
}

// Verified as it travelled: the rows that it decodes to have no checksum of their own.
bool PageCache::PlaceCoded(const wire::PagePayload& page, const Slot& slot) const {
  if (page.coded_checksum != PageChecksum({page.segment.value, page.page.value, page.version},
                                          page.coded, {}, positions(slot, page.fill))) {
    return false;
  }
  return DecodeInt8Rows(page.coded, shape_.dtype, page.fill, shape_.head_dim, k_rows(slot),
                        v_rows(slot));
}

bool PageCache::PlaceOnDevice(const wire::PagePayload& page, Slot* slot) const {
  gpu::IncomingPage incoming;
  incoming.name = {page.segment.value, page.page.value, page.version};
  incoming.checksum = page.coded_bytes > 0 ? page.coded_checksum : page.checksum;
  incoming.k_rows = page.k_rows;
  incoming.v_rows = page.v_rows;
  incoming.coded = page.coded;
  incoming.dtype = shape_.dtype;
  incoming.dim = static_cast<uint16_t>(shape_.head_dim);
  incoming.from = page.from;
  incoming.fill = page.fill;
  incoming.positions = positions(*slot, page.fill).data();
  incoming.frame = slot->frame;
  incoming.on_device = page.place == wire::PagePlace::kPushed;
  slot->ticket = arena_.intake().Add(incoming).value_or(0);
  return slot->ticket != 0;
}

// Positions are the host's in either case: it judges their range, the device their checksum.
bool PageCache::Place(const wire::PagePayload& page, TokenPos begin, TokenPos end,
                      Slot* slot) const {
  const size_t rows = size_t{page.fill} - page.from, bytes = rows * shape_.row_bytes();
  const bool coded = page.coded_bytes > 0;
  if (page.positions.size() != rows * sizeof(uint32_t) || (coded && page.from != 0) ||
      (!coded && (page.k_rows.size() != bytes || page.v_rows.size() != bytes))) {
    return false;  // named by extent, and the extent could not be read
  }
  if (page.place == wire::PagePlace::kPushed && !slot->on_device) return false;  // no host reads it
  std::memcpy(slot->positions + page.from, page.positions.data(), page.positions.size());
  for (uint32_t i = 0; i < page.fill; ++i) {
    if (slot->positions[i] < begin.value || slot->positions[i] >= end.value) return false;
  }
  if (slot->on_device) return PlaceOnDevice(page, slot);
  return coded ? PlaceCoded(page, *slot) : PlaceRows(page, *slot);
}

void PageCache::ListSelectedPositions(std::vector<uint32_t>* out) const {
  for (const PageId id : selected_) {
    const Slot& slot = slots_[id.value];
    out->insert(out->end(), slot.positions, slot.positions + views_[id.value].fill);
  }
}

void PageCache::Pin(uint32_t index, uint8_t rows_used, bool again) {
  Slot& slot = slots_[index];
  slot.recent = again;  // a new page has a whole turn of the hand before it is looked at
  slot.pinned = true;
  const uint8_t rows = rows_used == 0 || rows_used > slot.fill ? slot.fill : rows_used;
  views_[index] = {k_rows(slot), v_rows(slot), rows};
  selected_.push_back(PageId(index));
}

// A page that the server counts as held, since another worker was named that holds it.
PageCache::Outcome PageCache::TakeFromWorker(const wire::PagePayload& page, TokenPos begin,
                                             TokenPos end, uint8_t rows_used) {
  const auto offer = std::find_if(offers_.begin(), offers_.end(), [&](const auto& o) {
    return o.page.segment == page.segment && o.page.page == page.page;
  });
  if (offer == offers_.end()) return Outcome::kBad;
  const auto found = sharing_->Find(offer->place);
  if (!found.has_value() || page.from != page.fill || found->page.version != page.version ||
      found->page.fill != page.fill || found->page.checksum != page.checksum) {
    return Outcome::kMissed;
  }
  const size_t bytes = page.fill * shape_.row_bytes();
  wire::PagePayload whole = page;
  whole.from = 0;
  whole.place = wire::PagePlace::kPushed;  // so to speak: rows in the device's reach
  whole.k_rows = {found->frame, bytes};
  whole.v_rows = {found->frame + limits::kPageTokens * shape_.row_bytes(), bytes};
  whole.positions =
      std::as_bytes(std::span(found->page.positions)).first(page.fill * sizeof(uint32_t));
  if (Apply(whole, begin, end, rows_used) != Outcome::kReceived) return Outcome::kMissed;
  Slot& slot = slots_[slot_of_.at({page.segment.value, page.page.value})];
  slot.from = From::kWorker;
  slot.place = offer->place;
  return Outcome::kTaken;
}

PageCache::Outcome PageCache::Apply(const wire::PagePayload& page, TokenPos begin, TokenPos end,
                                    uint8_t rows_used) {
  const Key key{page.segment.value, page.page.value};
  const auto found = slot_of_.find(key);
  const bool resident = found != slot_of_.end();
  if (resident && slots_[found->second].pinned) return Outcome::kRepeated;
  if (page.fill == 0 || page.fill > limits::kPageTokens || page.from > page.fill) {
    return Outcome::kBad;
  }
  if (page.from > 0) {  // builds on what should be here
    if (!resident) return TakeFromWorker(page, begin, end, rows_used);
    Slot& slot = slots_[found->second];
    if (slot.version != page.version || slot.fill != page.from ||
        (slot.lossy && page.from < page.fill) ||
        (page.from == page.fill && slot.checksum != page.checksum)) {
      Drop(found->second);
      return Outcome::kBad;
    }
    if (page.from == page.fill) {
      Pin(found->second, rows_used, true);
      return Outcome::kHit;
    }
  }
  const uint32_t index = resident ? found->second : TakeSlot();
  Slot& slot = slots_[index];
  slot.key = key;
  slot_of_[key] = index;
  Withdraw(&slot);
  arena_.AwaitCopies(slot.written);
  if (!Place(page, begin, end, &slot)) {
    Drop(index);
    return Outcome::kBad;
  }
  slot.version = page.version;
  slot.fill = page.fill;
  slot.checksum = page.checksum;
  slot.lossy = page.coded_bytes > 0;
  slot.from = page.place == wire::PagePlace::kMapped ? From::kMapped : From::kMessage;
  if (slot.on_device) {
    unsettled_.push_back(index);
  } else {
    const size_t from = page.from * shape_.row_bytes();
    arena_.Written(k_rows(slot) + from, page.fill * shape_.row_bytes() - from);
    slot.written = arena_.Written(v_rows(slot) + from, page.fill * shape_.row_bytes() - from);
  }
  Pin(index, rows_used, resident);
  return Outcome::kReceived;
}

uint32_t PageCache::selected_tokens() const {
  uint32_t tokens = 0;
  for (const PageId id : selected_) tokens += views_[id.value].fill;
  return tokens;
}

Status PageCache::Validate() const {
  uint32_t used = 0;
  uint32_t pinned = 0;
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.fill == 0) continue;
    ++used;
    pinned += slot.pinned ? 1 : 0;
    const auto it = slot_of_.find(slot.key);
    if (it == slot_of_.end() || it->second != i) return Internal("slot is not under its key");
    const size_t row_bytes = shape_.row_bytes();
    if (!slot.lossy && !slot.on_device &&
        PageChecksum({slot.key.segment, slot.key.page, slot.version},
                     {k_rows(slot), slot.fill * row_bytes}, {v_rows(slot), slot.fill * row_bytes},
                     positions(slot, slot.fill)) != slot.checksum) {
      return Internal("content of slot " + std::to_string(i) + " does not match its checksum");
    }
  }
  if (used != slot_of_.size()) return Internal("keys and used slots differ");
  if (used + free_slots_.size() != slots_.size()) return Internal("slots are lost");
  if (slots_.size() > capacity_) return Internal("more slots than the capacity");
  if (pinned != selected_.size()) return Internal("pinned pages are not the selected ones");
  return OkStatus();
}

}  // namespace icecache
