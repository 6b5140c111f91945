// PageCache: the pages of one (layer, kv head) that the worker holds, so that a page selected again
// is not sent again. CLOCK replacement: a page that was selected again
// outlives those that were selected once.
//
// A step: 1. ListResident goes out with the request   2. BeginStep   3. Apply each page of the
// reply   4. Settle   5. attention over view() and selected(); selected pages cannot be evicted
// within their step
//
// Every page is verified (checksum over content and name, positions in range) before it is attended
// to; one that fails is dropped. In a frame of the host's that is done in Apply. In one of the
// device's (PageArena) the device verifies what it copied, and Settle waits for its word: until
// then the page is neither listed nor to be attended to. Owner's thread: the decode thread. Not for
// capacities below a selection's pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/wire/data_codec.h"
#include "kernels/paged_kv.h"
#include "worker/page_arena.h"
#include "worker/page_sharing.h"

namespace icecache {

class PageCache {
 public:
  // The arena outlives the cache. `sharing`: with other workers, borrowed, pages of `slice` (layer
  // * kv_heads + kv head). REQUIRES: arena frames of shape.page_bytes(), capacity_pages > 0; an
  // intake, for sharing.
  PageCache(const ModelShape& shape, uint32_t capacity_pages, PageArena& arena,
            PageSharing* sharing = nullptr, uint32_t slice = 0);
  ~PageCache();  // withdraws what was shared
  PageCache(PageCache&&) = default;

  // With sharing: also what other workers hold of the segments that RetainSegments named.
  void ListResident(std::vector<wire::ResidentPage>* pages);
  void BeginStep();
  // Drops pages of other segments than these: what a new context of the same worker cannot use.
  void RetainSegments(std::span<const SegmentId> segments);

  enum class Outcome {
    kHit,       // was resident as it is
    kReceived,  // content came: a new page, a new version or new rows (in a frame of the device's:
                // and will be judged by Settle)
    kBad,     // failed verification, or refers to content that is not here; dropped, fetch it whole
    kTaken,   // as kReceived, from a frame of another worker's
    kMissed,  // another worker held it when it was listed, and no longer does; fetch it whole
    kRepeated,  // already selected in this step; ignored, or its tokens would count twice
  };
  // `rows_used`: attend to only the first so many rows in this step (a page that was fetched again
  // may have grown by rows that the reply counted elsewhere); 0: all. Positions of indexed tokens
  // lie in [positions_begin, positions_end).
  Outcome Apply(const wire::PagePayload& page, TokenPos positions_begin, TokenPos positions_end,
                uint8_t rows_used = 0);

  // All pages of a reply that are the worker's to attend to; on_outcome(page, outcome) for each.
  // Those that build on what is here come first: a new page must not evict one that the same reply
  // counts on.
  template <typename Fn>
  void ApplyAll(std::span<const wire::PagePayload> pages, TokenPos positions_begin,
                TokenPos positions_end, const Fn& on_outcome) {
    for (const bool here : {true, false}) {
      for (const wire::PagePayload& page : pages) {
        if (page.place == wire::PagePlace::kAttended || (page.from > 0) != here) continue;
        on_outcome(page, Apply(page, positions_begin, positions_end));
      }
    }
  }

  // Waits for the device's word on the pages that came since BeginStep. Those that are damaged are
  // dropped and listed, each with where it came from. An error of the device: nothing is known.
  enum class From : uint8_t { kMessage, kMapped, kWorker };  // a page's rows
  struct Damaged {
    wire::ResidentPage page;
    From from = From::kMessage;
    bool replaced = false;  // kWorker: while it was copied; whatever the copy holds is not used
  };
  Status Settle(std::vector<Damaged>* damaged);
  // Instead: of a step that was given up, nothing unjudged stays.
  void DropUnsettled();

  // For AttentionBackend::AttendPages: page ids are slots of this cache.
  PagedKv view() const {
    return {shape_.dtype, shape_.head_dim, static_cast<uint32_t>(views_.size()), views_.data()};
  }
  std::span<const PageId> selected() const { return selected_; }
  // Positions of the tokens in selected pages.
  void ListSelectedPositions(std::vector<uint32_t>* positions) const;
  uint32_t selected_tokens() const;
  uint32_t page_count() const { return static_cast<uint32_t>(slot_of_.size()); }

  // INTERNAL naming the first broken invariant; slow, for tests.
  Status Validate() const;

 private:
  struct Key {
    uint64_t segment = 0;
    uint32_t page = 0;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const {
      return std::hash<uint64_t>{}(key.segment * 0x9e3779b97f4a7c15u + key.page);
    }
  };
  struct Slot {
    Key key;
    uint32_t version = 0;
    uint8_t fill = 0;  // 0: the slot is free
    bool recent = false;
    bool pinned = false;
    bool lossy = false;      // came coded in int8: near what the checksum is of, and cannot grow
    bool on_device = false;  // the frame
    From from = From::kMessage;
    uint64_t checksum = 0;          // of the server's content
    uint64_t written = 0;           // PageArena::Written
    uint64_t ticket = 0;            // of the intake, until it is settled
    PageSharing::Place place;       // kWorker: that it was copied from
    std::optional<uint32_t> entry;  // under which others find it (PageSharing::Publish)
    std::byte* frame = nullptr;
    uint32_t positions[limits::kPageTokens] = {};
  };

  std::byte* k_rows(const Slot& slot) const { return slot.frame; }
  std::byte* v_rows(const Slot& slot) const;
  std::span<const std::byte> positions(const Slot& slot, size_t fill) const {
    return std::as_bytes(std::span(slot.positions)).first(fill * sizeof(uint32_t));
  }
  bool Place(const wire::PagePayload& page, TokenPos begin, TokenPos end, Slot* slot) const;
  bool PlaceRows(const wire::PagePayload& page, const Slot& slot) const;
  bool PlaceCoded(const wire::PagePayload& page, const Slot& slot) const;
  bool PlaceOnDevice(const wire::PagePayload& page, Slot* slot) const;
  Outcome TakeFromWorker(const wire::PagePayload& page, TokenPos begin, TokenPos end,
                         uint8_t rows_used);
  void Publish(Slot* slot);
  void Withdraw(Slot* slot);
  uint32_t TakeSlot();
  void Drop(uint32_t slot);
  void Discard(uint32_t slot);
  void Pin(uint32_t slot, uint8_t rows_used, bool again);

  const ModelShape shape_;
  const uint32_t capacity_;
  PageArena& arena_;
  PageSharing* const sharing_;  // or null
  const uint32_t slice_;
  std::vector<Slot> slots_;
  std::vector<PageView> views_;  // one per slot
  std::unordered_map<Key, uint32_t, KeyHash> slot_of_;
  std::vector<uint32_t> free_slots_;
  std::vector<PageId> selected_;
  std::vector<uint32_t> unsettled_;         // slots, some of which may have been dropped
  std::vector<SegmentId> segments_;         // of which others' pages are listed
  std::vector<PageSharing::Offer> offers_;  // of others, since ListResident
  uint32_t hand_ = 0;
};

}  // namespace icecache
