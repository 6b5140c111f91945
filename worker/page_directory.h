// PageDirectory: which pages lie in the frames that a worker shares with other workers of its host
// and tenant (docs/gpu.md, "Pages of other workers"). Memory that the owner writes and the others
// have mapped for reading: an entry per page, found by slice, that says what the page is called,
// which frame holds it, and what is needed to verify a copy of it.
//
//   1. Publish    a page lies in a frame, whole and verified
//   2. Withdraw   before anything is written to the frame, or it goes
//
// An entry has a sequence number, odd while nothing can be had from it: whoever copied a frame asks
// for the number again when the copy is made (PageDirectoryView::Unchanged), and what changed is
// not used. That, and the checksum of the copy, is why readers need no lock and the owner never
// waits for them. All that is shared is atomic.
//
// Owner's thread: the decode thread. Costs: 256 bytes of the host's per frame; Publish writes two
// cache lines, List reads one per entry of the slice, whether it is used or not. When the entries
// of a slice are used up its further pages are not offered.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/shared_memory.h"
#include "common/status.h"

namespace icecache {

// A page in a frame of a worker.
struct DirectoryPage {
  SegmentId segment;
  PageId page;
  uint32_t version = 0;
  uint8_t fill = 0;
  uint32_t frame = 0;     // index
  uint64_t checksum = 0;  // PageChecksum of all rows
  uint32_t positions[limits::kPageTokens] = {};
};

struct DirectoryEntry;  // in shared memory

// A page as it was listed.
struct DirectoryRef {
  uint32_t entry = 0;
  uint64_t sequence = 0;
};

class PageDirectory {
 public:
  // For frames of the shape's pages. RESOURCE_EXHAUSTED.
  static Result<PageDirectory> Make(const ModelShape& shape, uint32_t frame_count);

  // For PageDirectoryView::Open.
  const SharedMemoryName& name() const { return memory_.name(); }
  uint32_t frame_count() const { return frame_count_; }

  // The entry; nullopt: the slice has no more. `slice`: layer * kv_heads + kv head.
  std::optional<uint32_t> Publish(uint32_t slice, const DirectoryPage& page);
  void Withdraw(uint32_t entry);

 private:
  PageDirectory(SharedMemory memory, uint32_t frame_count, uint32_t slices, uint32_t per_slice);
  DirectoryEntry& at(uint32_t entry) const;

  SharedMemory memory_;
  uint32_t frame_count_ = 0;
  uint32_t per_slice_ = 0;
  std::vector<std::vector<uint32_t>> free_;  // entries, by slice
};

// Another worker's directory. Nothing in it is believed: what it names is within the frames, and
// the rest is for the page's checksum to find out.
class PageDirectoryView {
 public:
  // INVALID_ARGUMENT: no directory of this shape. UNAVAILABLE: its owner is gone.
  static Result<PageDirectoryView> Open(const SharedMemoryName& name, const ModelShape& shape);

  uint32_t frame_count() const { return frame_count_; }

  // fn(name, ref) for each page of the slice; of the page only the name (segment, page, version,
  // fill) is filled in.
  template <typename Fn>
  void List(uint32_t slice, const Fn& fn) const {
    DirectoryPage page;
    for (uint32_t i = 0; i < per_slice_; ++i) {
      DirectoryRef ref{slice * per_slice_ + i, 0};
      if (ReadName(&ref, &page)) fn(page, ref);
    }
  }
  // The whole of what was listed; nullopt when it is there no longer.
  std::optional<DirectoryPage> Read(const DirectoryRef& ref) const;
  // The frame holds since `ref` was listed what it held then.
  bool Unchanged(const DirectoryRef& ref) const;

 private:
  PageDirectoryView() = default;
  const DirectoryEntry& at(uint32_t entry) const;
  bool ReadName(DirectoryRef* ref, DirectoryPage* page) const;

  SharedMemory memory_;
  uint32_t frame_count_ = 0;
  uint32_t per_slice_ = 0;
};

}  // namespace icecache
