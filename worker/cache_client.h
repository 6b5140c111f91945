// CacheClient: the worker's side of the data plane. One channel per shard; requests go straight to
// the shard that owns a slice (ShardOf). Calls are synchronous on the reactor, except that Select
// lets the caller compute between sending and waiting, and LayerUpload (layer_upload.h) runs in the
// background. A lost connection comes back by itself while leases live (shard_link.h); a Select
// that it interrupted is asked once more within its deadline, everything else ends with
// UNAVAILABLE.
//
// Errors: UNAVAILABLE when a connection is lost, DEADLINE_EXCEEDED, or what the shard answered;
// each names the shard. Owner's thread: the reactor's; not from inside its handlers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/channel.h"
#include "common/ids.h"
#include "common/limits.h"
#include "common/model_shape.h"
#include "common/wire/control_codec.h"
#include "common/wire/data_codec.h"
#include "worker/layer_rows.h"
#include "worker/shard_link.h"
#include "worker/sink_window.h"

namespace icecache {

// The right to address a context's slices.
struct ContextHandle {
  ContextId id;
  Epoch epoch;
  ModelShape shape;
};

struct CacheClientOptions {
  Duration request_deadline = limits::kRequestDeadline;
  Duration build_deadline = std::chrono::minutes(5);  // clustering a long document's slice
  uint64_t upload_bytes_in_flight_max = 16u << 20;
  std::function<bool()> interrupted;  // asked while waiting; true ends waits with CANCELLED
  ChannelOptions channel;
  ReplyMode reply_mode = ReplyMode::kAuto;
  std::function<Status()> leases_alive;  // as ShardLinkOptions
  uint64_t jitter_seed = 0;              // likewise
  DevicePages device;                    // likewise
};

struct HeadPages {
  KvHeadId head;
  std::vector<wire::ResidentPage> pages;
};

// Who a Select is for: says what it holds and takes what arrives. Lives until FinishSelect or
// AbandonSelect.
class SelectionSink {
 public:
  virtual ~SelectionSink() = default;
  // Adds to a head of the request: pages held, and where to look.
  virtual void FillHead(wire::SelectHead* wanted) = 0;
  // One head's answer, valid during the call. Pages that failed verification are added to `refetch`
  // and arrive through OnRefetched, or not at all.
  virtual void OnSelection(const wire::HeadSelection& selection,
                           std::vector<wire::ResidentPage>* refetch) = 0;
  virtual void OnRefetched(KvHeadId head, const wire::PagePayload& page) = 0;
  // A message was handed over as a whole. What it points to ends now, but for mapped memory.
  virtual Status OnReplyTaken() = 0;
  // Everything has come, or will not be waited for. Pages that only now turn out to be damaged:
  // those named the first time arrive through OnRefetched, and it is called once more.
  virtual Status Settle(std::vector<HeadPages>* damaged) = 0;
};

// Pointers and spans are borrowed until FinishSelect or AbandonSelect.
struct SelectParams {
  LayerId layer;
  std::span<const KvHeadId> heads;  // ascending; empty: all of the layer
  const float* queries = nullptr;  // [kv_heads, group, head_dim], scaled
  uint32_t max_pages = 0;
  uint32_t read_cap = 0;
  float min_mass = 0;
  bool residual = true;
  bool check = false;  // the server compares its answer with exact attention, for its metrics
  bool int8 = false;  // pages in the reply may come coded (reply mode inline only)
  TokenPos append_first;
  std::span<const LayerRows> append;  // tokens that left the window, one each
  Duration deadline{0};
};

// A Select on its way: what StartSelect returns.
struct SelectState;
using SelectCall = std::shared_ptr<SelectState>;

struct SelectOutcome {
  bool complete = true;   // every shard answered in time and every bad page came again
  bool confirmed = true;  // every shard has the appended tokens
  uint64_t server_select_ns = 0;   // summed over shards
  uint64_t slowest_select_ns = 0;  // of the slowest shard
  uint64_t bytes_moved = 0;        // requests and replies, metas and bodies
  Duration sending{0};   // making and sending the requests
  Duration waiting{0};   // idle until the last reply, without handling any
  Duration handling{0};  // decoding replies and running the sink
};

class CacheClient {
 public:
  // Starts a connection to each shard; a failure shows at Attach.
  static Result<std::unique_ptr<CacheClient>> Connect(Reactor& reactor, Transport& transport,
                                                      const std::vector<std::string>& shards,
                                                      const CacheClientOptions& options);
  ~CacheClient();
  CacheClient(const CacheClient&) = delete;
  CacheClient& operator=(const CacheClient&) = delete;

  // Introduces a context to every shard. Once per grant.
  Status Attach(const wire::Grant& grant);

  // Asks every shard that owns heads of the layer; `meanwhile` runs after the requests are on their
  // way. An error only when a shard refused or is lost; a missed deadline is an incomplete outcome.
  // DATA_LOSS when a shard breaks the protocol (more pages than asked for, a head twice).
  Result<SelectOutcome> Select(const ContextHandle& context, const SelectParams& params,
                               SelectionSink& sink, const std::function<void()>& meanwhile);
  // The same in two halves: replies reach the sink whenever the loop turns between them. Any number
  // may be open. `limit`: how long to wait from now, within the deadline of the call.
  SelectCall StartSelect(const ContextHandle& context, const SelectParams& params,
                         SelectionSink& sink);
  Result<SelectOutcome> FinishSelect(const SelectCall& call, Duration limit);
  // FinishSelect would not wait (or no longer: all calls have ended).
  bool Arrived(const SelectCall& call) const;
  // Nobody waits: what still comes is dropped.
  void AbandonSelect(const SelectCall& call);
  // What StartSelect makes between the two leaves with ReleaseSelects, as one message per shard (or
  // several, of limits::kSelectsPerBatchMax): the sequences of a batch ask together. Returns the
  // time that sending took. Deadlines run from StartSelect.
  void HoldSelects() { holding_ = true; }
  Duration ReleaseSelects();

  // Fills `window` (made for the context's sink and window sizes) with sinks and tail of all
  // layers. DATA_LOSS when the rows do not match their checksum or `info`.
  Status FetchWindow(const ContextHandle& context, const wire::ContextInfo& info,
                     SinkWindow* window);

  // OK, or UNAVAILABLE naming the shard whose connection is lost.
  Status Health() const;

  uint64_t bytes_moved() const;   // both directions, metas and bodies
  uint64_t bytes_mapped() const;  // of pages read in the server's memory instead
  uint32_t reconnects() const;
  ShardLink& link(ShardId shard) { return *links_[shard.value]; }

  // For LayerUpload.
  uint32_t shard_count() const { return static_cast<uint32_t>(links_.size()); }
  std::vector<KvHeadId> HeadsOf(LayerId layer, ShardId shard, const ModelShape& shape) const;
  // Channel::Call with bytes counted and errors that name the shard.
  void Call(ShardId shard, OutMessage message, Duration deadline, Channel::Done done);
  // Turns the loop until done(); CANCELLED when interrupted, DEADLINE_EXCEEDED after `limit`.
  Status Wait(const std::function<bool()>& done, Duration limit);
  const CacheClientOptions& options() const { return options_; }

 private:
  // How long a wait may outlast the deadlines of the calls that it waits for.
  static constexpr Duration kGrace = std::chrono::milliseconds(500);
  struct FetchState;
  CacheClient(Reactor& reactor, const CacheClientOptions& options)
      : reactor_(reactor), options_(options) {}
  void OnSelectReply(const SelectCall& state, ShardId shard,
                     const std::vector<KvHeadId>& heads, const Result<InMessage>& reply);
  void SendSelect(const SelectCall& state, ShardId shard,
                  const std::vector<KvHeadId>& heads, bool hold);
  void OnSelectFailed(SelectState& state, ShardId shard, const std::vector<KvHeadId>& heads,
                      const Status& status);
  void FetchRemote(const SelectCall& state, ShardId shard, const std::vector<KvHeadId>& heads,
                   wire::SelectReply decoded);
  void TakeSelectReply(const SelectCall& state, ShardId shard, const std::vector<KvHeadId>& heads,
                       const wire::SelectReply& decoded, TimePoint start);
  Status RetryLost(const SelectCall& state);
  Status Settle(const SelectCall& state);
  void ResolveNamed(const SelectState& state, ShardId shard, wire::SelectReply* reply);
  Status ApplySelection(SelectState& state, const std::vector<KvHeadId>& heads,
                        const wire::SelectReply& reply,
                        std::vector<wire::FetchPagesRequest>* refetches);
  void Refetch(const SelectCall& state, ShardId shard,
               const wire::FetchPagesRequest& request);
  OutMessage SelectMessage(SelectState& state, ShardId shard,
                           const std::vector<KvHeadId>& heads);
  // A buffer that no message in flight uses.
  std::shared_ptr<std::vector<std::byte>> Buffer();
  Result<std::vector<LayerRows>> FetchPart(const ContextHandle& context, wire::RowsPart part,
                                           uint32_t count, TokenPos first);

  Reactor& reactor_;
  const CacheClientOptions options_;
  std::vector<std::unique_ptr<ShardLink>> links_;  // by shard
  std::vector<std::shared_ptr<std::vector<std::byte>>> buffers_;
  Duration handling_{0};  // of all Selects so far
  bool holding_ = false;
  std::vector<std::vector<Channel::Request>> held_;  // by shard
};

}  // namespace icecache
