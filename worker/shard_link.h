// ShardLink: a worker's connection to one shard. Remembers what was attached, and when the
// connection is lost connects again and attaches again, as long as the leases live: the control
// connection says so. Also chooses how pages come (ReplyMode), once, and says why in the log.
//
//   ready -> lost -> (back-off, connect, attach) ... -> ready, or given up
//
// Calls in flight end with UNAVAILABLE when the connection is lost; whether they can be repeated is
// their caller's to know. Owner's thread: the reactor's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/channel.h"
#include "common/ids.h"
#include "common/limits.h"
#include "common/model_shape.h"
#include "common/wire/control_codec.h"
#include "common/wire/data_codec.h"
#include "worker/extent_map.h"
#include "worker/page_way.h"
#include "worker/remote_extents.h"
#include "worker/reply_mode.h"

namespace icecache {

namespace gpu {
class PushBuffer;
struct PushRegion;
}  // namespace gpu

// Where pages go: nowhere in particular (the CPU), or into frames of a device.
struct DevicePages {
  bool there = false;  // a device
  PageWay way = PageWay::kAuto;
  gpu::PageIntake* intake = nullptr;  // borrowed; null: pages are verified on the host
  gpu::PushBuffer* push = nullptr;    // borrowed, with intake; null: none is offered
};

struct ShardLinkOptions {
  ChannelOptions channel;
  Duration request_deadline = limits::kRequestDeadline;
  ReplyMode mode = ReplyMode::kAuto;
  // The control connection's health: OK while leases can be alive. Empty: a lost connection stays
  // lost.
  std::function<Status()> leases_alive;
  uint64_t jitter_seed = 0;  // 0: a random one
  DevicePages device;
};

// Meta and body.
uint64_t MessageBytes(const OutMessage& message);

class ShardLink {
 public:
  ShardLink(Reactor& reactor, Transport& transport, ShardId shard, uint32_t shard_count,
            std::string address, const ShardLinkOptions& options);
  ~ShardLink();
  ShardLink(const ShardLink&) = delete;
  ShardLink& operator=(const ShardLink&) = delete;

  Status Open();                      // starts to connect; a failure shows at Attach
  void Close() {  // ends calls, while the rest still stands; no more of any kind
    remote_.reset();
    channel_.reset();
  }

  // Introduces a context; `done` on a later turn.
  void Attach(const wire::Grant& grant, std::function<void(Status)> done);
  // Channel::Call with bytes counted and errors that name the shard.
  void Call(OutMessage message, Duration deadline, Channel::Done done);
  // Selects in one message; each is a Call.
  void CallTogether(std::vector<Channel::Request> selects);

  bool ready() const { return connected_ && attaching_ == 0; }
  // A connection that is or will be lost is tried again.
  bool reconnects() const;
  // OK, also while it is connecting again; UNAVAILABLE when it has no hope.
  Status Health() const;

  // kAuto before the first Attach; then one of the others.
  ReplyMode mode() const { return mode_; }
  // Points the rows of a page that is named by extent at the mapping; they are valid until the loop
  // turns. Leaves them empty when that cannot be.
  void Resolve(ContextId context, const ModelShape& shape, wire::PagePayload* page);

  // Where the shard may push so many bytes of pages; null: they come otherwise.
  std::shared_ptr<const gpu::PushRegion> LendRegion(size_t bytes);

  // In mode kRemote: RemoteExtents::Fetch. When the network cannot do it, the mode becomes kInline.
  bool remote() const { return mode_ == ReplyMode::kRemote; }
  void FetchRemote(ContextId context, Epoch epoch, const ModelShape& shape,
                   RemoteExtents::Reply reply, std::function<void(Status)> done);

  uint64_t bytes_moved() const { return bytes_moved_; }    // both directions, metas and bodies
  uint64_t bytes_mapped() const { return bytes_mapped_; }  // read in the server's memory
  uint32_t reconnects_done() const { return reconnects_done_; }
  const std::string& address() const { return address_; }
  std::string Name() const;  // "shard 1 at 127.0.0.1:40001"

 private:
  struct Attached {
    ContextId context;
    std::vector<std::byte> ticket;
  };
  Channel::Done Counted(Channel::Done done);
  void UseEndpoint(std::unique_ptr<Endpoint> endpoint);
  void SendAttach(const std::vector<std::byte>& ticket, std::function<void(Status)> done);
  void ChooseMode(const std::string& extents, std::span<const std::byte> ticket);
  void ChooseWay(std::span<const std::byte> ticket, bool pushes, std::function<void()> done);
  void DecideWay(const PageWayFacts& facts);
  void OfferMemory(std::span<const std::byte> ticket, std::function<void(Status)> done);
  void OnLost(const Status& status);
  void TryLater();
  void Reconnect();
  void OnAttachedAgain(ContextId context, const Status& status);

  Reactor& reactor_;
  Transport& transport_;
  const ShardId shard_;
  const uint32_t shard_count_;
  const std::string address_;
  const ShardLinkOptions options_;
  std::unique_ptr<Channel> channel_;
  bool connected_ = false;
  std::vector<Attached> attached_;  // the latest last
  ReplyMode mode_ = ReplyMode::kAuto;
  PageWay way_ = PageWay::kAuto;  // until it is chosen, and without a device
  bool offered_ = false;          // memory, on this connection
  bool pushing_ = false;          // and the shard has opened it
  std::unique_ptr<ExtentMap> extents_;  // in mode kMapped
  std::unique_ptr<RemoteExtents> remote_;  // in mode kRemote; of channel_
  uint64_t bytes_moved_ = 0;
  uint64_t bytes_mapped_ = 0;

  // While lost.
  std::mt19937_64 random_;
  Duration backoff_ = limits::kReconnectBackoffMin;
  Reactor::TimerId timer_ = 0;
  TimePoint lost_since_;
  size_t attaching_ = 0;  // answers to wait for after connecting again
  uint32_t reconnects_done_ = 0;
  Status given_up_;
};

}  // namespace icecache
