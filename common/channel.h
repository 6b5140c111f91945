// Channel: requests and replies with deadlines over one Endpoint, and a heartbeat in both
// directions.
//
// UCX never reports a stopped peer and misses most link losses (notes: feasibility 3d), so a
// channel sends a heartbeat whenever it has been quiet for kHeartbeatInterval and declares the peer
// dead after kHeartbeatMisses silent intervals. Every call ends exactly once: with the reply, with
// the peer's error status, with DEADLINE_EXCEEDED, or with UNAVAILABLE when the connection is lost.
//
// Both sides use it: a client calls, a server sets a handler and responds. Thread: the reactor's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/limits.h"
#include "common/transport.h"

namespace icecache {

struct ChannelOptions {
  Duration heartbeat_interval = limits::kHeartbeatInterval;
  int heartbeat_misses = limits::kHeartbeatMisses;
  uint32_t in_flight_max = limits::kRequestsInFlightMax;
};

// Message flags used by channels.
inline constexpr uint16_t kFlagReply = 1;   // answers the request with this id
inline constexpr uint16_t kFlagError = 2;   // with kFlagReply: meta is a wire::Status
inline constexpr uint16_t kFlagOneWay = 4;  // no reply expected
inline constexpr uint16_t kKindHeartbeat = 0;

class Channel {
 public:
  Channel(Reactor& reactor, std::unique_ptr<Endpoint> endpoint, ChannelOptions options = {});
  ~Channel();  // closes; calls in flight end with CANCELLED, after the destructor nothing runs
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // The reply is valid during `done` only. Body parts and pin: as Endpoint::Send; they stay alive
  // until UCX lets go, also when the call has ended by its deadline. RESOURCE_EXHAUSTED (through
  // done, on a later turn) when in_flight_max calls are open.
  using Done = std::function<void(Result<InMessage>)>;
  uint64_t Call(OutMessage request, Duration deadline, Done done);  // id is set by the channel
  // Several requests that travel as the one message that `join` makes of them, ids set. Each of them
  // is a call and ends by itself.
  struct Request {
    OutMessage message;
    Duration deadline{0};
    Done done;
  };
  using Join = std::function<OutMessage(std::span<OutMessage>)>;
  void CallTogether(std::vector<Request> requests, const Join& join);
  // Ends the call with CANCELLED now; a late reply is dropped.
  void CancelCall(uint64_t id);
  void SendOneWay(OutMessage message);

  // Requests of the peer. The handler answers each later through Reply or ReplyError with its id.
  void SetHandler(std::function<void(const InMessage&)> on_request);
  void Reply(uint64_t id, OutMessage reply);
  void ReplyError(uint64_t id, const Status& status);

  // Before this thread computes for longer than the peer's patience (a clustering, a prefill
  // without turns of the loop): the peer extends it once, up to kSilenceAnnouncedMax, until the
  // next message. Deadlines of its calls hold.
  void AnnounceSilence(Duration at_most);

  // Runs once when the peer is lost (also by silence) or Close was called by the peer.
  void SetOnClosed(std::function<void(Status)> on_closed);
  bool closed() const;
  void Close();

  Endpoint& endpoint();
  uint32_t calls_in_flight() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;  // shared with the callback that runs: it may destroy the channel
};

}  // namespace icecache
