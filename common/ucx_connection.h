// UcxConnection: one UCX endpoint on a worker of its own, with what is on its way out and in. Used
// by ucx_transport.cc only; part of the border to UCX.
//
// A worker of its own, because the queue through which a worker receives over shared memory is
// written by all its peers: one that is killed in the middle of a write leaves a slot that never
// becomes complete, and nothing from anybody arrives behind it. So a dead process takes its own
// connection with it and no other. What that costs is in docs/dataplane.md.
//
// UCX calls back from inside ucp_worker_progress and from inside sends. A callback never runs code
// of ours beyond this border: it records what happened, and Progress() acts on it afterwards, when
// no UCX frame is on the stack. So handlers may send, close and destroy anything but the transport.
//
// Lifecycle: 1. open, established by the peer's hello -> 2. ended (by Close, destruction of the
// Endpoint, or failure; the UCX endpoint is force-closed once, handlers never run again) -> 3.
// removed (UCX has let go of every buffer, or had its time; the worker is destroyed).
#pragma once

#include <ucp/api/ucp.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/transport.h"
#include "common/ucx_message.h"
#include "common/ucx_read.h"

namespace icecache {

inline constexpr unsigned kUcxMessageId = 1;  // the one active message id

class UcxConnection;

// What connections and their transport share. Everything on the reactor's thread.
struct UcxCore {
  explicit UcxCore(Reactor& r);
  ~UcxCore();
  Reactor& reactor;
  ucp_context_h context = nullptr;
  bool shared_memory = false;  // workers take some of /dev/shm
  ReceiveBuffers buffers;
  std::vector<std::unique_ptr<UcxSend>> spare_sends;
  // All that are not removed.
  std::unordered_map<UcxConnection*, std::shared_ptr<UcxConnection>> connections;
  bool delivering = false;             // handlers run
  std::vector<uint64_t> aligned_meta;  // of the message being delivered
};

// A worker that serves one thread and wakes it through *event_fd. RESOURCE_EXHAUSTED, with the
// remedy, when there is no room for it in /dev/shm or too few files may be opened; UNAVAILABLE with
// UCX's reason.
Status OpenUcxWorker(const UcxCore& core, ucp_worker_h* worker, int* event_fd);

class UcxConnection final : public Pollable, public std::enable_shared_from_this<UcxConnection> {
 public:
  // `peer`: for messages and logs.
  UcxConnection(UcxCore& core, std::string peer);
  ~UcxConnection() override;
  UcxConnection(const UcxConnection&) = delete;
  UcxConnection& operator=(const UcxConnection&) = delete;

  // Call once each, in this order. Errors leave nothing behind.
  Status OpenWorker();
  // Parameters of ucp_ep_create are completed with the error handler. The client says hello at
  // once, the server when it has heard the client's.
  enum class Role { kClient, kServer };
  Status Open(Role role, ucp_ep_params_t params);

  // The Endpoint's side.
  void Send(OutMessage message);
  void Read(std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
            std::function<void(Status)> done);
  void SetHandlers(std::function<void(const InMessage&)> on_message,
                   std::function<void(Status)> on_closed);
  void Close();
  uint64_t bytes_sent() const { return bytes_sent_; }
  uint64_t bytes_queued() const { return bytes_queued_; }
  std::string Describe() const;

  // The loop's side.
  bool Progress() override;
  int event_fd() const override { return event_fd_; }
  bool Arm() override;
  // Shared memory does not tell a sender that its peer has made room.
  bool has_silent_work() const override {
    return incomplete_sends_ > 0 || reads_.any_in_flight();
  }

  // The transport's side, when it is destroyed: closes, lets UCX finish until then, and removes.
  void Drain(std::chrono::steady_clock::time_point until);

 private:
  friend struct UcxSend;
  friend struct UcxReceive;
  struct Handlers {
    std::function<void(const InMessage&)> on_message;
    std::function<void(Status)> on_closed;
  };

  void Deliver(UcxReceived received);
  void Tend();
  void FinishReads();
  void Fail(Status status);
  void End();
  void TendEnd();
  void CloseEndpoint();
  bool Finished() const;
  void Remove();

  bool WindowOpen(const UcxSend& send) const;
  void PumpQueue();
  void FindLanes();
  void SayHello();
  void HearHello();
  std::unique_ptr<UcxSend> TakeSend();
  void Submit(std::unique_ptr<UcxSend> send);
  void SendCompleted(UcxSend* send, ucs_status_t status);

  static ucs_status_t OnMessage(void* self, const void* header, size_t header_bytes, void* data,
                                size_t data_bytes, const ucp_am_recv_param_t* param);
  ucs_status_t Receive(const void* header, size_t header_bytes, void* data, size_t data_bytes,
                       uint64_t attributes);
  ucs_status_t ReceiveEager(const MessageHeader& header, void* data, size_t bytes, bool keep);
  ucs_status_t ReceiveRendezvous(const MessageHeader& header, void* descriptor, size_t bytes);
  void ReceiveCompleted(UcxReceive* receive, ucs_status_t status);
  void Enqueue(UcxReceived received);

  UcxCore* core_;  // null when removed
  const std::string peer_;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  ucp_ep_h endpoint_ = nullptr;
  bool said_hello_ = false;
  std::string lanes_;         // the transports of an established connection
  bool established_ = false;  // the peer's hello has come: messages may go
  std::shared_ptr<Handlers> handlers_;
  Status failure_;
  bool ended_ = false;
  std::chrono::steady_clock::time_point ended_at_;
  bool closing_ = false;          // a close request is in flight
  bool wants_attention_ = false;  // a callback has left something to do
  // Freed after callbacks: what a pin's destructor does must not happen inside them.
  std::vector<std::shared_ptr<const void>> released_pins_;

  // Out.
  std::deque<std::unique_ptr<UcxSend>> queue_;  // accepted, not handed to UCX
  // Handed to UCX, from the oldest incomplete one on.
  std::deque<std::unique_ptr<UcxSend>> in_flight_;
  uint64_t in_flight_bytes_ = 0;
  uint64_t incomplete_sends_ = 0;
  uint32_t send_sequence_ = 0;
  uint64_t bytes_sent_ = 0, bytes_queued_ = 0;
  UcxReads reads_;

  // In.
  uint64_t receive_sequence_ = 0;          // of the next message to deliver
  std::map<uint64_t, UcxReceived> early_;  // arrived before an older one
  std::deque<UcxReceived> ready_;          // complete and in order
  std::map<UcxReceive*, std::unique_ptr<UcxReceive>> receiving_;
  uint64_t held_bytes_ = 0;  // of early_, ready_ and receiving_
};

}  // namespace icecache
