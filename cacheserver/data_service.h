// DataService: the data plane of one shard. Accepts connections, admits them by ticket, fences
// every request, and answers.
//
// Requests of a connection that has attached something wait for their turn among the tenants of the
// shard (TenantWork), in the order they came in; those of others can do no more than attach, and
// are answered at once.
//
// A request passes, in this order: its connection has attached the context (Attach, with a ticket
// of the control plane); the lease is alive on this shard; the tenant is the connection's; the
// message decodes against the context's shape; its epoch is the lease's; writing needs the writer's
// lease. Only then is the context asked. Whatever fails answers with an error and leaves the
// connection open: the peer's next request may be fine.
//
// A batch of Selects is nothing but its Selects, one after the other: each takes its turn, is
// fenced, may wait and is answered by itself, so that one sequence's error is not another's.
//
// A request that misses something in memory, or finds no memory, waits and is made again
// (data_waiting.cc).
//
// Replies carry pages straight from their frames, under a pin. What a selection appended is indexed
// after its answer has left. Thread: the shard's. Bounds: limits.h, "Server".
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cacheserver/extent_keys.h"
#include "cacheserver/page_push.h"
#include "cacheserver/shard.h"
#include "common/channel.h"
#include "common/metrics.h"
#include "common/reactor.h"

namespace icecache {

struct DataServiceOptions {
  // A peer that is silent for this long is gone; workers may compute for seconds without turning
  // their loop.
  Duration peer_timeout = limits::kLeaseTime;
  Duration heartbeat_interval = limits::kHeartbeatInterval;
  std::string extents;  // where ExtentService listens, told to workers that attach; empty: nowhere
  ExtentKeys* keys = nullptr;  // borrowed; none: no worker reads by itself
  PagePush* push = nullptr;    // borrowed; none: nothing is pushed
};

class DataService {
 public:
  DataService(Shard& shard, Reactor& reactor, MetricsRegistry& metrics,
              const DataServiceOptions& options);
  ~DataService();  // closes all connections
  DataService(const DataService&) = delete;
  DataService& operator=(const DataService&) = delete;

  void Accept(std::unique_ptr<Endpoint> endpoint);
  // From now on new connections are closed at once.
  void StopAccepting() { accepting_ = false; }

  size_t connection_count() const { return connections_.size(); }

 private:
  using RequestId = uint64_t;
  struct Connection {
    uint64_t id = 0;
    std::unique_ptr<Channel> channel;
    std::optional<TenantId> tenant;  // of the first ticket; later ones must be of the same
    std::unordered_map<ContextId, Epoch> attached;
    TimePoint last_attached;           // when it last had a living lease, or was made
    std::shared_ptr<PushTarget> push;  // memory that it has offered; null: none
    // Rows continue one another: while one PutRows waits for room (0: none), those that come after
    // it stand behind it, in their order.
    RequestId put_waits = 0;
    std::deque<RequestId> puts_behind;
    // By transport, which is known when the connection stands.
    bool transport_known = false;
    Counter* bytes_sent = nullptr;
    Counter* bytes_received = nullptr;
  };
  // What a fenced request may touch.
  struct Fenced {
    Context* context = nullptr;
    const Lease* lease = nullptr;
  };
  struct BuildInFlight;
  // A request that waits, for its turn or for what it lacks.
  struct Request {
    uint64_t connection = 0;
    InMessage message;
    std::shared_ptr<const void> memory;  // of the message; goes before the transport
    std::optional<TimePoint> give_up;    // set when it first waits for pages or room
    bool waits = false;                  // for pages or room
  };

  void Receive(Connection& connection, InMessage message);
  void Enqueue(Connection& connection, const InMessage& message,
               const std::shared_ptr<const void>& memory);
  void Refuse(Connection& connection, const InMessage& message, const Status& status);
  void Handle(Connection& connection, const InMessage& message);
  Status Dispatch(Connection& connection,
                  const InMessage& message);  // an error is not yet answered
  Result<Fenced> Fence(const Connection& connection, const InMessage& message, bool write) const;
  Status CheckEpoch(const Fenced& fenced, Epoch epoch) const;

  Status Attach(Connection& connection, const InMessage& message);
  Status PutRows(Connection& connection, const InMessage& message);
  Status Build(Connection& connection, const InMessage& message);
  Status Select(Connection& connection, const InMessage& message);
  Status FetchRows(Connection& connection, const InMessage& message);
  Status FetchPages(Connection& connection, const InMessage& message);
  Status GiveExtentKeys(Connection& connection, const InMessage& message);
  Status OfferMemory(Connection& connection, const InMessage& message);

  Status AppendRows(const Fenced& fenced, const wire::SelectRequest& request);
  Status SelectHeads(Context& context, const wire::SelectRequest& request, Misses* misses);
  static Status CopyRows(const Context& context, const wire::FetchRowsRequest& request, size_t i,
                         wire::FetchRowsReply* header, std::vector<std::byte>* body,
                         Misses* misses);
  void NameByExtent(wire::HeadSelection* selection);
  std::vector<PushSpan> PlaceInRegion(const Connection& connection,
                                      const wire::SelectRequest& request);
  void ReplyWhenPushed(Connection& connection, const InMessage& message, OutMessage reply,
                       const std::vector<PushSpan>& spans);
  void CountPages(const wire::HeadSelection& selection);
  Status CheckHead(const Context& context, LayerId layer, const float* queries,
                   const wire::HeadSelection& selection);
  void RememberSelection(const wire::SelectRequest& request, Duration took);
  // Body parts of scratch_'s pages, neighbours in memory as one part.
  Status GatherPages(OutMessage* out) const;

  // OK: the request is answered later.
  Status WaitForPages(const Misses& misses);
  // As above; `status`, why there is no room, where waiting is of no use.
  Status WaitForRoom(const Status& status);
  TimePoint EndOfPatience(const InMessage& message) const;
  Result<RequestId> KeepCurrent();
  void AgainWhenRoom(RequestId kept, const Status& status);
  void Again(RequestId kept, const Status& status);
  void Serve(RequestId id, const Status& status);
  void StandBehind(Connection& connection, RequestId id);

  void Reply(Connection& connection, const InMessage& request, OutMessage reply);
  void FinishBuild(const BuildInFlight& build);
  void Count(uint16_t kind, StatusCode code);
  void CountBytes(Connection& connection, uint64_t sent, uint64_t received);
  void Close(uint64_t connection);
  void Sweep();

  Shard& shard_;
  Reactor& reactor_;
  MetricsRegistry& metrics_;
  const DataServiceOptions options_;
  Gauge& connection_gauge_;
  Counter& bytes_mapped_;
  Counter& pages_returned_;
  Counter& pages_resident_;
  Counter& pages_mapped_;
  Counter& pages_pushed_;
  Counter& pages_attended_;
  Counter& tokens_read_;
  Counter& rows_received_;
  Counter& checks_;
  Counter& checks_skipped_;
  Counter& checked_mass_;
  Counter& checked_error_;
  Counter& selections_warm_;
  Counter& selections_cold_;
  Histogram& append_seconds_;
  Histogram& select_seconds_;
  Histogram& gather_seconds_;

  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::vector<std::unique_ptr<Connection>>
      closed_;  // until the next turn: not inside their own callbacks
  uint64_t next_connection_ = 1;
  // Not yet answered, but for Builds. Others name them by id, so that they end with this object.
  std::unordered_map<RequestId, std::shared_ptr<Request>> requests_;
  RequestId next_request_ = 1;
  uint32_t requests_waiting_ = 0;  // for pages or room
  RequestId current_ = 0;          // while it is served; 0: of a connection without a tenant
  bool accepting_ = true;
  Reactor::TimerId sweep_ = 0;
  wire::SelectReply scratch_;  // reused by every Select: its vectors keep their memory
  std::array<std::array<Counter*, 16>, 10> counters_{};  // [kind][code], made on first use
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
