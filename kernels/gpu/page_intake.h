// PageIntake: pages on their way into frames of the device. Their rows are copied into a landing
// buffer in pinned memory as they arrive, or left where they lie when the device can read there;
// then one copy takes the buffer over the bus, one launch spreads it over the frames (and decodes
// int8), one verifies the frames.
//
//   1. Add     a page; its rows are landed, or noted
//   2. Flush   before what was added may change; queues copy and launches
//   3. Settle  waits for them
//   4. intact  what is attended to is only what this is true of
//
// The landing buffer has two halves: when one is full, what comes next goes into the other while
// the device reads the first; only when both are full does Add wait. One thread, the device's. Ends
// before the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/checksum.h"
#include "common/limits.h"
#include "kernels/gpu/device.h"

namespace icecache::gpu {

// Rows [from, fill) of a page, or the int8 code of all of them.
struct IncomingPage {
  PageIdentity name;
  uint64_t checksum = 0;  // PageChecksum of all rows, or of the code
  std::span<const std::byte> k_rows, v_rows;
  std::span<const std::byte> coded;  // not empty: instead of rows; from is 0
  DType dtype = DType::kF16;
  uint16_t dim = 0;
  uint8_t from = 0, fill = 0;
  bool on_device = false;  // k_rows and v_rows are addresses of the device's, fit to be read until
                           // what reads them is settled
  const std::byte* positions = nullptr;  // u32 [fill]
  std::byte* frame = nullptr;  // K rows [kPageTokens], V rows; rows below `from` are there
};

class PageIntake {
 public:
  using Ticket = uint64_t;  // from 1

  // RESOURCE_EXHAUSTED when there is no room for the landing buffer. `landing_bytes`, of each half:
  // at most kLandingBytes, and room for a page.
  static Result<std::unique_ptr<PageIntake>> Make(Device& device,
                                                  size_t landing_bytes = limits::kLandingBytes);
  ~PageIntake();  // waits
  PageIntake(const PageIntake&) = delete;
  PageIntake& operator=(const PageIntake&) = delete;

  // Memory of the host's that pages will lie in; without this they are landed. The extent stays as
  // it is mapped until Forget, which waits for what reads it.
  Status Register(std::span<const std::byte> host);  // mapped read-only
  void Forget(const std::byte* host);                // nothing happens when it is not registered
  const DeviceInfo& device() const { return device_.info(); }

  // There are frames on the host, too, since the device is full: pages may have to come there.
  void NoteHostFrames() { host_frames_ = true; }
  bool host_frames() const { return host_frames_; }

  // REQUIRES: sizes that agree with from, fill and dim; a frame that no page added since the last
  // Flush goes to. nullopt: not a code of this size, or an error that the next Flush returns.
  std::optional<Ticket> Add(const IncomingPage& page);
  Status Flush();
  // OK: `intact` can be asked of this ticket and those before it.
  Status Settle(Ticket ticket);
  // Also false when kIntakePagesMax pages have been added since.
  bool intact(Ticket ticket) const;

  uint64_t landed_bytes() const { return landed_bytes_; }  // of rows and codes, so far
  uint64_t direct_bytes() const { return direct_bytes_; }  // read where they lay, in host memory
  uint64_t pushed_bytes() const { return pushed_bytes_; }  // in the device's

 private:
  struct Half {
    DeviceMemory pinned, device;
    size_t used = 0;
    size_t flushed = 0;  // bytes below are on their way, or have arrived
  };
  explicit PageIntake(Device& device) : device_(device) {}
  const std::byte* Source(std::span<const std::byte> bytes);
  std::byte* Land(std::span<const std::byte> bytes);
  Status MakeRoom(size_t bytes);

  Device& device_;
  Half halves_[2];
  uint32_t filling_ = 0;   // index of the half
  DeviceMemory verdicts_;  // pinned, u32 [kIntakePagesMax], by ticket
  std::vector<CopySpan> spans_;
  std::vector<PageToVerify> pages_;
  std::map<const std::byte*, std::pair<size_t, const std::byte*>>
      registered_;  // host: size, device
  Ticket next_ = 1;
  Ticket settled_ = 0;  // this one and those before
  Status error_;        // of a Flush that Add made
  bool host_frames_ = false;
  uint64_t landed_bytes_ = 0, direct_bytes_ = 0, pushed_bytes_ = 0;
};

}  // namespace icecache::gpu
