// Ways in for pages: a worker with a device (the emulator, or a GPU) at a real server on this host.
// What lies in the device's frames is what was uploaded, whichever way it came.
#include <gtest/gtest.h>

#include "common/ucx_environment.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/gpu/push_buffer.h"
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
  uint64_t SelectAndCompare(LinkedWorker& worker, LayerSelection& selection, SelectionSink& sink,
                            bool int8) {
    const std::vector<KvHeadId> heads = {KvHeadId(0), KvHeadId(1)};
    const TokenPos end(LinkedWorker::kTokens);
    selection.Begin(heads, {TokenPos(0), end, end.value}, nullptr);
    SelectParams params = worker.Params();
    params.int8 = int8;
    const auto outcome = worker.link().cache().Select(worker.context(), params, sink, {});
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

  struct Run {
    PageWay way = PageWay::kAuto;
    ReplyMode mode = ReplyMode::kAuto;
    bool int8 = false;
    size_t push_bytes = limits::kPushBytes;
    bool pushes = false;       // the server does, on this kind of device
    bool host_frames = false;  // some other page had no room on the device
    bool spoils = false;       // what is pushed is overwritten before the device comes to copy it
  };
  struct Found {
    AttentionStats stats;
    uint64_t pages = 0, landed = 0, direct = 0, pushed = 0;
  };

  // A selection by this way, and another that finds all pages here.
  Found RunWay(const Run& run) {
    ApplyUcxEnvironment();
    const bool emulated = GetParam().name != "cuda";
    TestServer server({"--memory-size", "256MiB", "--threads", "2", "--push-pages",
                       !run.pushes ? "off"
                       : emulated  ? "emulated"
                                   : "auto"});
    gpu::DeviceFrames frames(*device_);
    const auto intake = gpu::PageIntake::Make(*device_).value();
    if (run.host_frames) intake->NoteHostFrames();
    gpu::PushBuffer push(*device_, run.push_bytes);
    ServerLinkOptions options;
    options.control.address = server.address();
    options.cache.reply_mode = run.mode;
    options.cache.device = {true, run.way, intake.get(), &push};
    Found found;
    {
      LinkedWorker worker;
      const Status opened = worker.Open(options);
      EXPECT_EQ(opened.ToString(), "OK");
      if (!opened.ok()) return found;
      PageArena arena(kShape.page_bytes(), &frames, intake.get());
      std::vector<PageCache> caches;
      for (int h = 0; h < 2; ++h) caches.emplace_back(kShape, LinkedWorker::kPages, arena);
      LayerSelection selection(kShape, caches, intake.get(), &found.stats);
      Spoiler spoiler(selection, *device_, push);
      SelectionSink& sink = run.spoils ? static_cast<SelectionSink&>(spoiler) : selection;
      found.pages = SelectAndCompare(worker, selection, sink, run.int8);
      EXPECT_EQ(found.pages, 2 * LinkedWorker::kPages);
      EXPECT_EQ(found.stats.page_misses, found.pages);
      EXPECT_EQ(SelectAndCompare(worker, selection, selection, run.int8), found.pages);
      EXPECT_EQ(found.stats.page_hits, found.pages);
      EXPECT_EQ(found.stats.mapped_gone, 0u);
      EXPECT_TRUE(run.spoils || found.stats.bad_pages == 0);
    }
    found.landed = intake->landed_bytes();
    found.direct = intake->direct_bytes();
    found.pushed = intake->pushed_bytes();
    // All that was lent has come back, if the memory was offered.
    EXPECT_TRUE(push.free_bytes() == 0 || push.free_bytes() == run.push_bytes);
    return found;
  }

  // Overwrites what was pushed when the copies of it are queued, and not yet made.
  class Spoiler final : public SelectionSink {
   public:
    Spoiler(LayerSelection& selection, gpu::Device& device, gpu::PushBuffer& push)
        : selection_(selection), device_(device), push_(push) {}
    void FillHead(wire::SelectHead* wanted) override { selection_.FillHead(wanted); }
    void OnSelection(const wire::HeadSelection& selection,
                     std::vector<wire::ResidentPage>* refetch) override {
      selection_.OnSelection(selection, refetch);
    }
    void OnRefetched(KvHeadId head, const wire::PagePayload& page) override {
      selection_.OnRefetched(head, page);
    }
    Status OnReplyTaken() override {
      KV_RETURN_IF_ERROR(selection_.OnReplyTaken());
      KV_ASSIGN_OR_RETURN(const std::vector<std::byte> handle, push_.Offer());
      KV_ASSIGN_OR_RETURN(const std::span<std::byte> memory, device_.Open(handle));
      std::memset(memory.data(), 0xff, 64);  // no row has such bytes
      device_.Close(memory.data());
      return OkStatus();
    }
    Status Settle(std::vector<HeadPages>* damaged) override { return selection_.Settle(damaged); }

   private:
    LayerSelection& selection_;
    gpu::Device& device_;
    gpu::PushBuffer& push_;
  };
};

TEST_P(PageWays, RegisteredExtentsAreReadByTheDevice) {
  if (!device_->info().registers) GTEST_SKIP() << "this device registers no memory";
  const Found found = RunWay({});
  EXPECT_EQ(found.stats.mapped_pages, found.pages);
  EXPECT_EQ(found.landed, 0u);
  EXPECT_GT(found.direct, 0u);
}

TEST_P(PageWays, MappedPagesAreLandedWhenAskedFor) {
  const Found found = RunWay({.way = PageWay::kLanding, .pushes = true});
  EXPECT_EQ(found.stats.mapped_pages, found.pages);
  EXPECT_GT(found.landed, 0u);
  EXPECT_EQ(found.direct + found.pushed, 0u);
}

TEST_P(PageWays, PagesInRepliesAreLanded) {
  const Found found = RunWay({.mode = ReplyMode::kInline});
  EXPECT_EQ(found.stats.mapped_pages + found.stats.pushed_pages, 0u);
  EXPECT_GT(found.landed, 0u);
  EXPECT_EQ(found.direct + found.pushed, 0u);
}

TEST_P(PageWays, AServerPushesPagesWhenAskedTo) {
  const Found found = RunWay({.way = PageWay::kIpc, .pushes = true});
  EXPECT_EQ(found.stats.pushed_pages, found.pages);
  EXPECT_EQ(found.landed + found.direct, 0u);
  EXPECT_EQ(found.pushed, found.pages * 2 * limits::kPageTokens * kShape.row_bytes());
}

TEST_P(PageWays, AutoIsPushingWhereExtentsAreNotRead) {
  const Found found = RunWay({.mode = ReplyMode::kInline, .pushes = true});
  EXPECT_EQ(found.stats.pushed_pages, found.pages);
  EXPECT_EQ(found.landed + found.direct, 0u);
}

TEST_P(PageWays, PushedPagesAreNeverCoded) {
  const Found found =
      RunWay({.way = PageWay::kIpc, .mode = ReplyMode::kInline, .int8 = true, .pushes = true});
  EXPECT_EQ(found.stats.pushed_pages, found.pages);
  EXPECT_EQ(found.stats.coded_pages, 0u);
}

TEST_P(PageWays, WithoutAServerThatPushesPagesAreLanded) {
  const Found found = RunWay({.way = PageWay::kIpc, .mode = ReplyMode::kInline});
  EXPECT_EQ(found.stats.pushed_pages, 0u);
  EXPECT_GT(found.landed, 0u);
}

TEST_P(PageWays, WhatDoesNotFitIsLanded) {
  const size_t rows = 2 * limits::kPageTokens * kShape.row_bytes();
  const Found found = RunWay(
      {.way = PageWay::kIpc, .mode = ReplyMode::kInline, .push_bytes = 6 * rows, .pushes = true});
  EXPECT_EQ(found.stats.pushed_pages, 6u);
  EXPECT_EQ(found.pushed, 6 * rows);
  EXPECT_EQ(found.landed, (found.pages - 6) * rows);
}

TEST_P(PageWays, NothingIsPushedWhileThereAreFramesOnTheHost) {
  const Found found = RunWay({.way = PageWay::kIpc, .pushes = true, .host_frames = true});
  EXPECT_EQ(found.stats.pushed_pages, 0u);
}

TEST_P(PageWays, APageThatIsOverwrittenAfterThePushComesAgain) {
  if (GetParam().name == "cuda") GTEST_SKIP() << "a process cannot open what it has exported";
  const Found found =
      RunWay({.way = PageWay::kIpc, .mode = ReplyMode::kInline, .pushes = true, .spoils = true});
  EXPECT_EQ(found.stats.bad_pages, 1u);  // at the start of the memory
  EXPECT_GT(found.landed, 0u);
}

INSTANTIATE_DEVICES(PageWays);

}  // namespace
}  // namespace icecache::test
