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
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/wire/data_codec.h"
#include "kernels/paged_kv.h"

namespace icecache {

namespace gpu {
class DeviceFrames;
class PageIntake;
}  // namespace gpu

// Page frames for all caches of a worker: grows by chunks, gives nothing back before its end. With
// `frames` they are on a device as well, or, with `intake`, there alone, until the device is full;
// pages in frames of the host's are copied there for each step.
class PageArena {
 public:
  explicit PageArena(size_t frame_bytes, gpu::DeviceFrames* frames = nullptr,
                     gpu::PageIntake* intake = nullptr)
      : frame_bytes_(frame_bytes), frames_(frames), intake_(intake), room_(frames != nullptr) {}
  std::byte* Allocate();
  void Free(std::byte* frame) { free_.push_back(frame); }
  // Whether only the device may touch the frame: pages come into it through intake().
  bool on_device(const std::byte* frame) const;
  gpu::PageIntake& intake() const { return *intake_; }
  // A page in a frame of the host's was verified: these bytes of it are new. What to await before
  // it is written again, as it may still be on its way to the device.
  uint64_t Written(const std::byte* at, size_t bytes);
  void AwaitCopies(uint64_t written);
  uint64_t bytes() const { return chunk_count_ * kFramesPerChunk * frame_bytes_; }

 private:
  static constexpr size_t kFramesPerChunk = 32;
  std::byte* AllocateChunk(size_t bytes);

  const size_t frame_bytes_;
  gpu::DeviceFrames* const frames_;
  gpu::PageIntake* const intake_;
  bool room_;  // on the device, as far as we know
  size_t chunk_count_ = 0;
  std::vector<std::unique_ptr<std::byte[]>> chunks_;
  std::vector<std::byte*> free_;
};

class PageCache {
 public:
  // The arena outlives the cache. REQUIRES: arena frames of shape.page_bytes(), capacity_pages > 0.
  PageCache(const ModelShape& shape, uint32_t capacity_pages, PageArena& arena);
  PageCache(PageCache&&) = default;

  void ListResident(std::vector<wire::ResidentPage>* pages) const;
  void BeginStep();
  // Drops pages of other segments than these: what a new context of the same worker cannot use.
  void RetainSegments(std::span<const SegmentId> segments);

  enum class Outcome {
    kHit,       // was resident as it is
    kReceived,  // content came: a new page, a new version or new rows (in a frame of the device's:
                // and will be judged by Settle)
    kBad,  // failed verification, or refers to content that is not here; dropped, fetch it whole
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
  struct Damaged {
    wire::ResidentPage page;
    bool mapped = false;  // else it came in a message
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
    bool mapped = false;     // the page's rows were last read in the server's memory
    uint64_t checksum = 0;   // of the server's content
    uint64_t written = 0;    // PageArena::Written
    uint64_t ticket = 0;     // of the intake, until it is settled
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
  uint32_t TakeSlot();
  void Drop(uint32_t slot);
  void Discard(uint32_t slot);
  void Pin(uint32_t slot, uint8_t rows_used, bool again);

  const ModelShape shape_;
  const uint32_t capacity_;
  PageArena& arena_;
  std::vector<Slot> slots_;
  std::vector<PageView> views_;  // one per slot
  std::unordered_map<Key, uint32_t, KeyHash> slot_of_;
  std::vector<uint32_t> free_slots_;
  std::vector<PageId> selected_;
  std::vector<uint32_t> unsettled_;  // slots, some of which may have been dropped
  uint32_t hand_ = 0;
};

}  // namespace icecache
