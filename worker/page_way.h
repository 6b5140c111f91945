// PageWay: how pages that have come to a worker get into the frames of its device (docs/gpu.md,
// "Ways in for pages"). ReplyMode, how they come to the worker, is chosen first: a way may need
// one. Chosen per shard when it is attached to, with one line in the log that says why.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache {

enum class PageWay : uint8_t {
  kAuto,        // registered, else ipc, else landing, else frames: what there is
  kFrames,      // verified in pinned frames of the host's, copied to their twins on the device
  kLanding,     // through a pinned landing buffer, verified on the device
  kIpc,         // written by the server into memory of the device, verified on the device
  kRegistered,  // read by the device in the server's memory on this host, verified on the device
};

std::string_view PageWayName(PageWay way);
Result<PageWay> ParsePageWay(std::string_view name);

// What there is.
struct PageWayFacts {
  bool landing = false;    // there is a landing buffer (PageIntake)
  bool mapped = false;     // the server's memory is mapped into this process
  bool registers = false;  // the device reads memory that is mapped for reading only
  bool pushes = false;     // the server has opened this worker's PushBuffer
  std::string_view no_push = "the server pushes no pages";  // why not; a borrowed text
};

struct PageWayChoice {
  PageWay way = PageWay::kFrames;
  std::string reason;
  bool denied = false;  // another was asked for
};

PageWayChoice ChoosePageWay(PageWay asked, const PageWayFacts& facts);

}  // namespace icecache
