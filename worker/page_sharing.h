// PageSharing: the pages of workers of one tenant on one host, for each other (docs/gpu.md, "Pages
// of other workers"). A worker that shares keeps its first page frames in memory of the device that
// the others may open (DeviceFrames::Share), and says in a directory (page_directory.h) which page
// is in which. A page that another one holds is copied from there, device to device, instead of
// coming from the server.
//
//   1. SetOthers   what the server says whom there is: opened, or let go
//   2. List        what the others hold of a slice: named to the server as held
//   3. Find        where one of these lies that was selected; the copy is made and verified
//   4. Unchanged   asked when the copy is made: nothing was written there meanwhile
//
// Another worker may replace a page at any time, or die: what was not copied whole is fetched from
// the server. What is open stays readable when its owner ends; it is let go when the server no
// longer names it. Owner's thread: the decode thread. Ends after the caches that publish here, and
// before the device.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/wire/control_codec.h"
#include "common/wire/data_codec.h"
#include "kernels/gpu/device_frames.h"
#include "worker/page_directory.h"

namespace icecache {

class PageSharing {
 public:
  // Takes `bytes` of the device for frames that are shared; less than 64 frames make no sense.
  // INVALID_ARGUMENT: less, or more than kSharedFramesMax frames. RESOURCE_EXHAUSTED.
  static Result<std::unique_ptr<PageSharing>> Make(gpu::Device& device, gpu::DeviceFrames& frames,
                                                   const ModelShape& shape, uint64_t bytes);
  ~PageSharing() { SetOthers({}); }
  PageSharing(const PageSharing&) = delete;
  PageSharing& operator=(const PageSharing&) = delete;

  const wire::ShareFrames& offer() const { return offer_; }  // for the server
  // One that cannot be opened is not tried again as long as it is named.
  void SetOthers(const std::vector<wire::SharedFrames>& others);
  uint32_t other_count() const;  // of those that are open

  // A verified page in this worker's frame `at`: its entry, for Withdraw. nullopt: that frame is
  // not shared, or the directory has no room. page.frame is filled in here.
  std::optional<uint32_t> Publish(uint32_t slice, const std::byte* at, DirectoryPage page);
  void Withdraw(uint32_t entry) { directory_.Withdraw(entry); }

  // A page as another worker holds it.
  struct Place {
    uint64_t owner = 0;
    DirectoryRef ref;
  };
  struct Offer {
    wire::ResidentPage page;
    Place place;
  };
  // Adds pages of these segments, at most kOfferedPagesMax, each once.
  void List(uint32_t slice, std::span<const SegmentId> segments, std::vector<Offer>* offers) const;
  struct Found {
    DirectoryPage page;
    const std::byte* frame = nullptr;  // on the device; readable until the loop turns, and longer
                                       // by what is queued
  };
  std::optional<Found> Find(const Place& place) const;
  bool Unchanged(const Place& place) const;

 private:
  struct Other {
    wire::SharedFrames named;
    std::span<std::byte> frames;  // empty: could not be opened
    std::optional<PageDirectoryView> directory;
  };
  PageSharing(gpu::Device& device, const ModelShape& shape, PageDirectory directory)
      : device_(device), shape_(shape), directory_(std::move(directory)) {}
  Status Open(const wire::SharedFrames& named, Other* other);

  gpu::Device& device_;
  const ModelShape shape_;
  PageDirectory directory_;
  wire::ShareFrames offer_;
  std::span<const std::byte> shared_;
  std::map<uint64_t, Other> others_;  // by id
};

}  // namespace icecache
