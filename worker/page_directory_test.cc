#include "worker/page_directory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 2, .head_dim = 64, .dtype = DType::kF16};
constexpr uint32_t kFrames = 16;  // four per slice, so entries for eight

DirectoryPage PageOf(uint64_t n) {
  DirectoryPage page;
  page.segment = SegmentId(n * 3);
  page.page = PageId(static_cast<uint32_t>(n));
  page.version = static_cast<uint32_t>(n % 7);
  page.fill = static_cast<uint8_t>(1 + n % limits::kPageTokens);
  page.frame = static_cast<uint32_t>(n % kFrames);
  page.checksum = n * 0x9e3779b97f4a7c15u;
  for (uint32_t i = 0; i < limits::kPageTokens; ++i) {
    page.positions[i] = static_cast<uint32_t>(n * 31 + i);
  }
  return page;
}
// All of it is of one page.
bool Whole(const DirectoryPage& found) {
  const DirectoryPage page = PageOf(found.page.value);
  return found.segment == page.segment && found.version == page.version &&
         found.fill == page.fill && found.frame == page.frame && found.checksum == page.checksum &&
         std::memcmp(found.positions, page.positions, sizeof(page.positions)) == 0;
}

std::vector<DirectoryRef> List(const PageDirectoryView& view, uint32_t slice) {
  std::vector<DirectoryRef> refs;
  view.List(slice, [&](const DirectoryPage&, const DirectoryRef& ref) { refs.push_back(ref); });
  return refs;
}

TEST(PageDirectory, WhatIsPublishedIsFoundInItsSliceUntilItIsWithdrawn) {
  PageDirectory directory = PageDirectory::Make(kShape, kFrames).value();
  const PageDirectoryView view = PageDirectoryView::Open(directory.name(), kShape).value();
  EXPECT_EQ(view.frame_count(), kFrames);
  EXPECT_TRUE(List(view, 0).empty());
  const auto entry = directory.Publish(1, PageOf(5));
  ASSERT_TRUE(entry.has_value());
  EXPECT_TRUE(List(view, 0).empty());
  const std::vector<DirectoryRef> listed = List(view, 1);
  ASSERT_EQ(listed.size(), 1u);
  const auto read = view.Read(listed[0]);
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->page, PageId(5));
  EXPECT_TRUE(Whole(*read) && view.Unchanged(listed[0]));
  directory.Withdraw(*entry);
  EXPECT_TRUE(List(view, 1).empty());
  EXPECT_FALSE(view.Unchanged(listed[0]) || view.Read(listed[0]).has_value());
  // The same page, again: not the one that was listed.
  ASSERT_TRUE(directory.Publish(1, PageOf(5)).has_value());
  EXPECT_FALSE(view.Unchanged(listed[0]) || view.Read(listed[0]).has_value());
}

TEST(PageDirectory, ASliceHasSoManyEntriesAndNoMore) {
  PageDirectory directory = PageDirectory::Make(kShape, kFrames).value();
  std::vector<uint32_t> entries;
  for (uint64_t n = 0; n < 8; ++n) entries.push_back(directory.Publish(3, PageOf(n)).value());
  EXPECT_FALSE(directory.Publish(3, PageOf(8)).has_value());
  EXPECT_TRUE(directory.Publish(2, PageOf(8)).has_value());
  directory.Withdraw(entries[4]);
  EXPECT_EQ(directory.Publish(3, PageOf(9)), entries[4]);
  const PageDirectoryView view = PageDirectoryView::Open(directory.name(), kShape).value();
  EXPECT_EQ(List(view, 3).size(), 8u);
}

TEST(PageDirectory, AnotherModelsIsRefused) {
  const PageDirectory directory = PageDirectory::Make(kShape, kFrames).value();
  ModelShape other = kShape;
  other.head_dim = 128;
  const auto view = PageDirectoryView::Open(directory.name(), other);
  EXPECT_EQ(view.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(view.status().message().find("another model"), std::string::npos);
}

// Random bytes in the place of header and entries: refused, or nothing that is listed points beyond
// the frames.
TEST(PageDirectory, WhatItsOwnerWritesIsNotBelieved) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 300; ++round) {
    const PageDirectory directory = PageDirectory::Make(kShape, kFrames).value();
    const SharedMemory shared =
        SharedMemory::Open(directory.name(), SharedMemory::Access::kWrite).value();
    const size_t first = round % 2 == 0 ? 0 : 64;  // with the header, or behind it
    for (size_t i = first; i < shared.bytes().size(); ++i) {
      if (random() % 8 == 0) shared.bytes()[i] = static_cast<std::byte>(random());
    }
    const auto view = PageDirectoryView::Open(directory.name(), kShape);
    if (!view.ok()) continue;
    for (uint32_t slice = 0; slice < 4; ++slice) {
      view->List(slice, [&](const DirectoryPage& page, const DirectoryRef& ref) {
        EXPECT_TRUE(page.frame < view->frame_count() && page.fill > 0 &&
                    page.fill <= limits::kPageTokens);
        const auto read = view->Read(ref);
        if (read.has_value()) {
          EXPECT_LT(read->frame, view->frame_count());
        }
      });
    }
  }
}

// The owner replaces pages as fast as it can; readers never see half of one, and know afterwards.
TEST(PageDirectory, ReadersSeeWholePagesWhileTheyAreReplaced) {
  PageDirectory directory = PageDirectory::Make(kShape, kFrames).value();
  std::atomic<bool> stop = false;
  std::atomic<uint64_t> read_count = 0;
  const auto reader = [&] {
    const PageDirectoryView view = PageDirectoryView::Open(directory.name(), kShape).value();
    while (!stop) {
      view.List(0, [&](const DirectoryPage& name, const DirectoryRef& ref) {
        const auto page = view.Read(ref);
        if (!page.has_value()) return;
        ++read_count;
        EXPECT_TRUE(page->page == name.page && Whole(*page)) << page->page.value;
      });
    }
  };
  std::thread readers[] = {std::thread(reader), std::thread(reader)};
  std::vector<uint32_t> entries;
  // So many pages, and until the readers have seen some, however the machine schedules them.
  for (uint64_t n = 0; n < 50000 || read_count < 100; ++n) {
    if (entries.size() == 8) {
      directory.Withdraw(entries[n % 8]);
      entries.erase(entries.begin() + static_cast<ptrdiff_t>(n % 8));
    }
    const auto entry = directory.Publish(0, PageOf(n % 1000));
    ASSERT_TRUE(entry.has_value());
    entries.push_back(*entry);
    if (n >= 50000) std::this_thread::yield();
  }
  stop = true;
  for (std::thread& thread : readers) thread.join();
}

}  // namespace
}  // namespace icecache
