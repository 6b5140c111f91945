// Ways in for pages: a worker with a device (the emulator, or a GPU) at a real server on this host.
// What lies in the device's frames is what was uploaded, whichever way it came.
#include <gtest/gtest.h>

#include "common/ucx_environment.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "tests/conformance/device_suite.h"
#include "tests/support/linked_worker.h"
#include "tests/support/process.h"
#include "worker/layer_selection.h"

namespace icecache::test {
namespace {

class PageWays : public gpu::DeviceSuite {
 protected:
  static constexpr ModelShape kShape = LinkedWorker::kShape;

  // Selects, and compares every page on the device with what was uploaded. Pages that came.
  uint64_t SelectAndCompare(LinkedWorker& worker, LayerSelection& selection) {
    const std::vector<KvHeadId> heads = {KvHeadId(0), KvHeadId(1)};
    const TokenPos end(LinkedWorker::kTokens);
    selection.Begin(heads, {TokenPos(0), end, end.value}, nullptr);
    const std::vector<float> queries(size_t{kShape.query_heads} * kShape.head_dim);
    SelectParams params;
    params.queries = queries.data();
    params.max_pages = LinkedWorker::kPages;
    params.append_first = end;
    params.deadline = kPatience;
    const auto outcome = worker.link().cache().Select(worker.context(), params, selection, {});
    EXPECT_TRUE(outcome.ok() && outcome->complete) << outcome.status().ToString();
    uint64_t pages = 0;
    for (const KvHeadId h : heads) {
      const PageCache& cache = selection.caches()[h.value];
      std::vector<uint32_t> positions;
      cache.ListSelectedPositions(&positions);
      size_t at = 0;
      for (const PageId id : cache.selected()) {
        const PageView view = cache.view().pages[id.value];
        ExpectRows(worker, h, view, std::span(positions).subspan(at, view.fill));
        at += view.fill;
        ++pages;
      }
    }
    return pages;
  }
  void ExpectRows(const LinkedWorker& worker, KvHeadId head, const PageView& view,
                  std::span<const uint32_t> positions) {
    const size_t row = kShape.row_bytes();
    const std::vector<std::byte> k = Download(view.k, view.fill * row),
                                 v = Download(view.v, view.fill * row);
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto same = [&](const std::vector<std::byte>& found, std::span<const std::byte> all) {
        return std::memcmp(found.data() + i * row, all.data() + positions[i] * row, row) == 0;
      };
      EXPECT_TRUE(same(k, worker.rows().k(head)) && same(v, worker.rows().v(head)))
          << "position " << positions[i];
    }
  }

  // Two selections by this way; `expect` looks at the intake afterwards.
  void RunWay(PageWay way, ReplyMode mode,
              const std::function<void(const gpu::PageIntake&)>& expect) {
    ApplyUcxEnvironment();
    TestServer server({"--memory-size", "256MiB", "--threads", "2"});
    gpu::DeviceFrames frames(*device_);
    const auto intake = gpu::PageIntake::Make(*device_).value();
    ServerLinkOptions options;
    options.control.address = server.address();
    options.cache.reply_mode = mode;
    options.cache.device = {true, way, intake.get()};
    LinkedWorker worker;
    ASSERT_EQ(worker.Open(options).ToString(), "OK");
    PageArena arena(kShape.page_bytes(), &frames, intake.get());
    std::vector<PageCache> caches;
    for (int h = 0; h < 2; ++h) caches.emplace_back(kShape, LinkedWorker::kPages, arena);
    AttentionStats stats;
    LayerSelection selection(kShape, caches, intake.get(), &stats);
    const uint64_t pages = SelectAndCompare(worker, selection);
    EXPECT_EQ(pages, 2 * LinkedWorker::kPages);
    EXPECT_EQ(stats.page_misses, pages);
    EXPECT_EQ(SelectAndCompare(worker, selection), pages);  // they are here
    EXPECT_EQ(stats.page_hits, pages);
    EXPECT_EQ(stats.bad_pages + stats.mapped_gone, 0u);
    EXPECT_EQ(stats.mapped_pages, mode == ReplyMode::kInline ? 0 : pages);
    expect(*intake);
  }
};

TEST_P(PageWays, RegisteredExtentsAreReadByTheDevice) {
  if (!device_->info().registers) GTEST_SKIP() << "this device registers no memory";
  RunWay(PageWay::kAuto, ReplyMode::kAuto, [](const gpu::PageIntake& intake) {
    EXPECT_EQ(intake.landed_bytes(), 0u);
    EXPECT_GT(intake.direct_bytes(), 0u);
  });
}

TEST_P(PageWays, MappedPagesAreLandedWhenAskedFor) {
  RunWay(PageWay::kLanding, ReplyMode::kAuto, [](const gpu::PageIntake& intake) {
    EXPECT_GT(intake.landed_bytes(), 0u);
    EXPECT_EQ(intake.direct_bytes(), 0u);
  });
}

TEST_P(PageWays, PagesInRepliesAreLanded) {
  RunWay(PageWay::kAuto, ReplyMode::kInline, [](const gpu::PageIntake& intake) {
    EXPECT_GT(intake.landed_bytes(), 0u);
    EXPECT_EQ(intake.direct_bytes(), 0u);
  });
}

INSTANTIATE_DEVICES(PageWays);

}  // namespace
}  // namespace icecache::test
