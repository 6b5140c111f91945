// PageTable: the pages of one head slice. Maps a PageId to its frame, fill, version and checksum,
// and keeps the PagedKv view that policies and kernels read.
//
// A frame holds K rows [kPageTokens, head_dim], V rows, then positions u32 [kPageTokens]
// (ModelShape::page_bytes()). Rows in a frame never change; a split moves rows to new frames under
// new versions.
//
// A page of a sealed slice that is stored below may lose its frame (Evict) and get one again
// (BeginLoad, the content is copied in, FinishLoad). Summaries, names and checksums stay; the view of
// a page that is not warm has null rows.
//
// Writing never asks the pool: frames are set aside first (ReserveFrames, owner's thread), so that
// a job may fill a table of its own on any thread and hand it over. Thread: one at a time;
// ReserveFrames, ReleaseSpares, MoveRows and destruction on the pool owner's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cacheserver/store/page_pool.h"
#include "common/ids.h"
#include "common/limits.h"
#include "kernels/paged_kv.h"

namespace icecache {

enum class Residency : uint8_t {
  kWarm = 0,     // in its frame
  kCold = 1,     // in the cold store only: no frame
  kLoading = 2,  // a frame is reserved and being filled from the cold store
};

// Content and name of one page; spans point into the frame.
struct PageContent {
  std::span<const std::byte> k_rows;     // [fill, head_dim]
  std::span<const std::byte> v_rows;     // [fill, head_dim]
  std::span<const std::byte> positions;  // u32 [fill]
  Frame frame;  // where they are
  uint32_t version = 0;
  uint32_t fill = 0;
  uint64_t checksum = 0;  // PageChecksum over (segment, page, version) and the above
};

class PageTable {
 public:
  struct Options {
    TenantId tenant;
    SegmentId segment;
    DType dtype = DType::kF16;
    uint32_t head_dim = 0;
  };
  // What is known of a page without its rows.
  struct PageName {
    uint32_t version = 0;
    uint32_t fill = 0;
    uint64_t checksum = 0;
  };
  PageTable(PagePool& pool, const Options& options);
  ~PageTable();  // releases all frames
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  // Sets frames aside until there are `count` spare ones. RESOURCE_EXHAUSTED: unchanged.
  Status ReserveFrames(uint32_t count);
  void ReleaseSpares();
  void ReservePages(uint32_t count);  // room in the table itself
  uint32_t spare_frames() const { return static_cast<uint32_t>(spares_.size()); }

  // Takes a spare. REQUIRES: spare_frames() > 0. The new page is empty: append to it, then Commit.
  PageId AddPage(uint32_t version);
  // REQUIRES: warm, fill < kPageTokens. Invalidates the checksum until Commit.
  void AppendRow(PageId page, const std::byte* k, const std::byte* v, uint32_t position);
  // Computes the checksum of the page as it stands: one read of the page.
  void Commit(PageId page);
  // Rows whose bit is set in mask move, in order, to the end of page `to`; the rest close up in a new
  // frame under a new version. Commits both. Takes a spare. REQUIRES: both warm, some rows stay, and
  // `to` has room.
  void MoveRows(PageId from, uint16_t mask, PageId to, uint32_t version);

  // All pages at once, cold. REQUIRES: an empty table; fills in 1..kPageTokens.
  void RestoreCold(std::span<const PageName> pages);
  PageName name(PageId page) const;
  // Gives the frame back. REQUIRES: warm, committed, not held.
  void Evict(PageId page);
  // RESOURCE_EXHAUSTED: unchanged. REQUIRES: cold.
  Status BeginLoad(PageId page);
  // Copies stored content (StoredPage's form) into the frame of a page that is loading, after
  // checking it against the checksum. DATA_LOSS names the page. Any thread.
  Status FillLoading(PageId page, std::span<const std::byte> stored) const;
  // REQUIRES: loading. loaded: it is warm from now on; else cold again.
  void EndLoad(PageId page, bool loaded);
  // The content of a warm page as it is stored: K rows [fill], V rows [fill], positions [fill].
  void AppendStored(PageId page, std::string* out) const;
  // The clock's bit: set when the page is used, taken back by the hand.
  void Touch(PageId page) { entries_[page.value].referenced = true; }
  bool TakeReferenced(PageId page) { return std::exchange(entries_[page.value].referenced, false); }
  bool referenced(PageId page) const { return entries_[page.value].referenced; }
  // A held page is not evicted. Holds count.
  void Hold(PageId page) { ++entries_[page.value].holds; }
  void Unhold(PageId page) { --entries_[page.value].holds; }
  bool held(PageId page) const { return entries_[page.value].holds > 0; }

  uint32_t page_count() const { return static_cast<uint32_t>(entries_.size()); }
  uint64_t token_count() const { return token_count_; }
  PagedKv view() const;
  PageContent content(PageId page) const;  // REQUIRES: warm, committed
  const uint32_t* positions(PageId page) const;
  // The page that a position was appended to last; nullopt: none, or not by this table's AppendRow.
  std::optional<PageId> FindPosition(uint32_t position) const;
  Residency residency(PageId page) const { return entries_[page.value].residency; }
  Frame frame(PageId page) const { return entries_[page.value].frame; }
  uint32_t frame_bytes() const { return frame_bytes_; }
  uint64_t frame_bytes_held() const {
    return uint64_t{frame_bytes_} * (entries_.size() - cold_count_ + spares_.size());
  }
  uint32_t cold_count() const { return cold_count_; }  // pages without a frame
  std::vector<PageId> ColdPages() const;               // all that are not warm, ascending
  uint32_t loading_count() const { return loading_count_; }
  TenantId tenant() const { return options_.tenant; }

  // Recomputes every checksum. DATA_LOSS names the first page that differs.
  Status Validate() const;

 private:
  struct Entry {
    Frame frame;
    uint64_t checksum = 0;
    uint32_t version = 0;
    Residency residency = Residency::kWarm;
    bool committed = false;
    bool referenced = false;
    uint16_t holds = 0;
  };
  std::byte* k_row(const Frame& frame, uint32_t row) const {
    return frame.data + size_t{row} * row_bytes_;
  }
  std::byte* v_row(const Frame& frame, uint32_t row) const {
    return frame.data + (size_t{limits::kPageTokens} + row) * row_bytes_;
  }
  uint32_t* position_row(const Frame& frame) const {
    return reinterpret_cast<uint32_t*>(frame.data + size_t{2} * limits::kPageTokens * row_bytes_);
  }
  uint64_t Checksum(PageId page) const;
  Frame TakeSpare();

  PagePool& pool_;
  const Options options_;
  const size_t row_bytes_;
  const uint32_t frame_bytes_;
  std::vector<Entry> entries_;
  std::vector<PageView> views_;  // parallel to entries_
  std::vector<Frame> spares_;
  uint64_t token_count_ = 0;
  // Page by position, in blocks that are made when a position of theirs first appears: 4 bytes a
  // token, 0.8 % of a 16-bit K and V of 128.
  static constexpr uint32_t kPositionsPerBlock = 1024;
  std::vector<std::vector<uint32_t>> page_of_;
  uint32_t cold_count_ = 0;
  uint32_t loading_count_ = 0;
};

// Keeps all pages of a table that are in memory there, for a scope in which memory is asked for.
class PageHold {
 public:
  explicit PageHold(PageTable& table) : table_(table), count_(table.page_count()) {
    for (uint32_t p = 0; p < count_; ++p) table_.Hold(PageId(p));
  }
  ~PageHold() {
    for (uint32_t p = 0; p < count_; ++p) table_.Unhold(PageId(p));
  }
  PageHold(const PageHold&) = delete;
  PageHold& operator=(const PageHold&) = delete;

 private:
  PageTable& table_;
  const uint32_t count_;
};

}  // namespace icecache
