#include "worker/page_directory.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "common/limits.h"

namespace icecache {

// Written by its owner, one word at a time: every store after that of an odd sequence is a release,
// so who reads one of them and then the sequence sees that it has changed. (A fence would say the
// same with fewer words, but ThreadSanitizer does not know fences.)
struct alignas(64) DirectoryEntry {
  std::atomic<uint64_t> sequence;  // 0: never used; odd: nothing can be had
  std::atomic<uint64_t> segment;
  std::atomic<uint64_t> page;   // id, version << 32
  std::atomic<uint64_t> frame;  // index, fill << 32
  std::atomic<uint64_t> checksum;
  std::atomic<uint64_t> positions[limits::kPageTokens / 2];  // two each
};
static_assert(sizeof(DirectoryEntry) == 128 && std::atomic<uint64_t>::is_always_lock_free);

namespace {

// What a view checks before it looks at any entry.
struct alignas(64) Header {
  char magic[8] = {'i', 'c', 'e', 'd', 'i', 'r', '0', '1'};
  uint32_t slices = 0;
  uint32_t per_slice = 0;
  uint32_t frame_count = 0;
  uint32_t page_bytes = 0;
};

constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
constexpr std::memory_order kAcquire = std::memory_order_acquire;
constexpr std::memory_order kRelease = std::memory_order_release;

uint64_t Both(uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; }
uint32_t Low(uint64_t both) { return static_cast<uint32_t>(both); }
uint32_t High(uint64_t both) { return static_cast<uint32_t>(both >> 32); }

uint32_t SliceCount(const ModelShape& shape) { return shape.layers * shape.kv_heads; }

size_t DirectoryBytes(uint64_t slices, uint64_t per_slice) {
  return sizeof(Header) + slices * per_slice * sizeof(DirectoryEntry);
}

DirectoryEntry* Entries(const SharedMemory& memory) {
  return reinterpret_cast<DirectoryEntry*>(memory.bytes().data() + sizeof(Header));
}

bool Readable(uint64_t sequence) { return sequence > 0 && sequence % 2 == 0; }

}  // namespace

Result<PageDirectory> PageDirectory::Make(const ModelShape& shape, uint32_t frame_count) {
  KV_CHECK(frame_count > 0 && frame_count <= limits::kSharedFramesMax);
  // Slices get frames as they need them, so some have more than their part.
  const uint32_t slices = SliceCount(shape), per_slice = 2 * ((frame_count + slices - 1) / slices);
  KV_ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Make(DirectoryBytes(slices, per_slice)));
  Header header;
  header.slices = slices;
  header.per_slice = per_slice;
  header.frame_count = frame_count;
  header.page_bytes = static_cast<uint32_t>(shape.page_bytes());
  std::memcpy(memory.bytes().data(), &header, sizeof(header));
  return PageDirectory(std::move(memory), frame_count, slices, per_slice);
}

PageDirectory::PageDirectory(SharedMemory memory, uint32_t frame_count, uint32_t slices,
                             uint32_t per_slice)
    : memory_(std::move(memory)), frame_count_(frame_count), per_slice_(per_slice), free_(slices) {
  for (uint32_t s = 0; s < slices; ++s) {
    for (uint32_t i = per_slice; i-- > 0;) free_[s].push_back(s * per_slice + i);
  }
}

DirectoryEntry& PageDirectory::at(uint32_t entry) const { return Entries(memory_)[entry]; }

std::optional<uint32_t> PageDirectory::Publish(uint32_t slice, const DirectoryPage& page) {
  KV_CHECK(slice < free_.size() && page.frame < frame_count_);
  if (free_[slice].empty()) return std::nullopt;
  const uint32_t index = free_[slice].back();
  free_[slice].pop_back();
  DirectoryEntry& entry = at(index);
  const uint64_t odd = entry.sequence.load(kRelaxed) | 1;
  entry.sequence.store(odd, kRelaxed);
  entry.segment.store(page.segment.value, kRelease);
  entry.page.store(Both(page.page.value, page.version), kRelease);
  entry.frame.store(Both(page.frame, page.fill), kRelease);
  entry.checksum.store(page.checksum, kRelease);
  for (uint32_t i = 0; i < limits::kPageTokens; i += 2) {
    entry.positions[i / 2].store(Both(page.positions[i], page.positions[i + 1]), kRelease);
  }
  entry.sequence.store(odd + 1, kRelease);
  return index;
}

void PageDirectory::Withdraw(uint32_t index) {
  DirectoryEntry& entry = at(index);
  const uint64_t sequence = entry.sequence.load(kRelaxed);
  KV_CHECK(Readable(sequence));
  // Sequentially consistent: whatever is done to the frame comes after it.
  entry.sequence.store(sequence + 1);
  free_[index / per_slice_].push_back(index);
}

Result<PageDirectoryView> PageDirectoryView::Open(const SharedMemoryName& name,
                                                  const ModelShape& shape) {
  PageDirectoryView view;
  KV_ASSIGN_OR_RETURN(view.memory_, SharedMemory::Open(name, SharedMemory::Access::kRead));
  Header expected, header;
  const size_t bytes = view.memory_.bytes().size();
  if (bytes < sizeof(header)) return InvalidArgument("not a directory of pages: too short");
  std::memcpy(&header, view.memory_.bytes().data(), sizeof(header));  // once: it may change
  if (std::memcmp(header.magic, expected.magic, sizeof(header.magic)) != 0) {
    return InvalidArgument("not a directory of pages of this release");
  }
  if (header.slices != SliceCount(shape) || header.page_bytes != shape.page_bytes()) {
    return InvalidArgument(
        "a directory of another model's pages: " + std::to_string(header.slices) +
        " slices and pages of " + std::to_string(header.page_bytes) + " bytes, expected " +
        std::to_string(SliceCount(shape)) + " and " + std::to_string(shape.page_bytes()));
  }
  if (header.frame_count == 0 || header.frame_count > limits::kSharedFramesMax ||
      header.per_slice > 2 * limits::kSharedFramesMax ||
      bytes != DirectoryBytes(header.slices, header.per_slice)) {
    return InvalidArgument("a directory of pages whose sizes disagree");
  }
  view.frame_count_ = header.frame_count;
  view.per_slice_ = header.per_slice;
  return view;
}

const DirectoryEntry& PageDirectoryView::at(uint32_t entry) const {
  return Entries(memory_)[entry];
}

bool PageDirectoryView::ReadName(DirectoryRef* ref, DirectoryPage* page) const {
  const DirectoryEntry& entry = at(ref->entry);
  ref->sequence = entry.sequence.load(kAcquire);
  if (!Readable(ref->sequence)) return false;
  page->segment = SegmentId(entry.segment.load(kAcquire));
  const uint64_t name = entry.page.load(kAcquire), frame = entry.frame.load(kAcquire);
  page->page = PageId(Low(name));
  page->version = High(name);
  page->frame = Low(frame);
  page->fill = static_cast<uint8_t>(std::min<uint32_t>(High(frame), UINT8_MAX));
  return entry.sequence.load(kRelaxed) == ref->sequence && page->frame < frame_count_ &&
         page->fill > 0 && page->fill <= limits::kPageTokens;
}

std::optional<DirectoryPage> PageDirectoryView::Read(const DirectoryRef& ref) const {
  DirectoryPage page;
  DirectoryRef now = ref;
  if (!ReadName(&now, &page) || now.sequence != ref.sequence) return std::nullopt;
  const DirectoryEntry& entry = at(ref.entry);
  page.checksum = entry.checksum.load(kAcquire);
  for (uint32_t i = 0; i < limits::kPageTokens; i += 2) {
    const uint64_t both = entry.positions[i / 2].load(kAcquire);
    page.positions[i] = Low(both);
    page.positions[i + 1] = High(both);
  }
  if (!Unchanged(ref)) return std::nullopt;
  return page;
}

bool PageDirectoryView::Unchanged(const DirectoryRef& ref) const {
  return at(ref.entry).sequence.load() == ref.sequence;
}

}  // namespace icecache
