// UcxConnection: one UCX endpoint with what is on its way out and in. Used by ucx_transport.cc
// only; together with it and ucx_environment.cc the border to UCX.
//
// UCX calls back from inside ucp_worker_progress and from inside sends. A callback never runs code
// of ours beyond this file: it records what happened in UcxCore, and the transport's Progress()
// acts on it afterwards, when no UCX frame is on the stack. So handlers may send, close and destroy
// anything.
//
// Lifecycle: 1. open, established by the peer's hello -> 2. ended (by Close, destruction of the
// Endpoint, or failure; the UCX endpoint is force-closed once, handlers never run again) -> 3.
// finished (UCX has let go of every buffer: removed).
#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/message_header.h"
#include "common/receive_buffers.h"
#include "common/transport.h"

namespace icecache {

inline constexpr unsigned kUcxMessageId = 1;  // the one active message id

// A message that has arrived completely. Its data is either a descriptor of UCX's, given back on
// destruction, or a buffer of ours.
struct UcxReceived {
  UcxReceived() = default;
  UcxReceived(UcxReceived&& other) noexcept { *this = std::move(other); }
  UcxReceived& operator=(UcxReceived&& other) noexcept;
  ~UcxReceived();

  MessageHeader header{};
  const std::byte* data = nullptr;
  uint64_t data_bytes = 0;
  ReceiveBuffers::Buffer buffer;
  ucp_worker_h worker = nullptr;  // set when UCX holds the data
};

class UcxConnection;
struct UcxSend;
struct UcxReceive;

// What connections and their transport share. Everything on the reactor's thread.
struct UcxCore {
  UcxCore();
  ~UcxCore();
  ucp_worker_h worker = nullptr;
  ReceiveBuffers buffers;
  // Recorded in callbacks, acted upon by Progress().
  std::deque<std::pair<std::shared_ptr<UcxConnection>, UcxReceived>> ready;
  std::vector<std::shared_ptr<UcxConnection>> attention;
  std::vector<std::shared_ptr<const void>> released_pins;
  // All connections that are not finished, and those UCX may deliver to.
  std::unordered_map<UcxConnection*, std::shared_ptr<UcxConnection>> connections;
  std::unordered_map<ucp_ep_h, UcxConnection*> by_endpoint;
  std::vector<std::unique_ptr<UcxSend>> spare_sends;
  uint64_t incomplete_sends = 0;       // of all connections that are not orphaned
  std::vector<uint64_t> aligned_meta;  // of the message being delivered
};

class UcxConnection : public std::enable_shared_from_this<UcxConnection> {
 public:
  // `peer`: for messages and logs.
  UcxConnection(UcxCore& core, std::string peer);
  ~UcxConnection();
  UcxConnection(const UcxConnection&) = delete;
  UcxConnection& operator=(const UcxConnection&) = delete;

  // Parameters of ucp_ep_create are completed with the error handler. Call once. The client says
  // hello at once, the server when it has heard the client's.
  enum class Role { kClient, kServer };
  Status Open(Role role, ucp_ep_params_t params);

  // The Endpoint's side.
  void Send(OutMessage message);
  void SetHandlers(std::function<void(const InMessage&)> on_message,
                   std::function<void(Status)> on_closed);
  void Close();
  uint64_t bytes_sent() const { return bytes_sent_; }
  uint64_t bytes_queued() const { return bytes_queued_; }
  std::string Describe() const;

  // The transport's side.
  // In UCX's active message callback: takes the message. The result is the callback's.
  ucs_status_t Receive(const void* header, size_t header_bytes, void* data, size_t data_bytes,
                       uint64_t attributes);
  void Deliver(const UcxReceived& received);
  // Outside callbacks: ends a failed connection, sends what waited for the window.
  void Tend();
  bool Finished() const;
  // UCX is shut down: nothing may be called any more.
  void Orphan();
  void Fail(Status status);

 private:
  friend struct UcxSend;
  friend struct UcxReceive;
  struct Handlers {
    std::function<void(const InMessage&)> on_message;
    std::function<void(Status)> on_closed;
  };

  bool WindowOpen(const UcxSend& send) const;
  void PumpQueue();
  void SayHello();
  void HearHello();
  std::unique_ptr<UcxSend> TakeSend();
  void Submit(std::unique_ptr<UcxSend> send);
  void SendCompleted(UcxSend* send, ucs_status_t status);
  ucs_status_t ReceiveEager(const MessageHeader& header, void* data, size_t bytes, bool keep);
  ucs_status_t ReceiveRendezvous(const MessageHeader& header, void* descriptor, size_t bytes);
  void ReceiveCompleted(UcxReceive* receive, ucs_status_t status);
  void Enqueue(UcxReceived received);
  void NeedAttention();
  void End();
  void CloseEndpoint();

  UcxCore* core_;  // null when orphaned
  const std::string peer_;
  bool said_hello_ = false;
  bool established_ = false;  // the peer's hello has come: messages may go
  ucp_ep_h endpoint_ = nullptr;
  std::shared_ptr<Handlers> handlers_;
  Status failure_;
  bool ended_ = false;
  bool closing_ = false;  // a close request is in flight
  bool wants_attention_ = false;

  // Out.
  std::deque<std::unique_ptr<UcxSend>> queue_;  // accepted, not handed to UCX
  std::deque<std::unique_ptr<UcxSend>>
      in_flight_;  // handed to UCX, from the oldest incomplete one on
  uint64_t in_flight_bytes_ = 0;
  uint64_t incomplete_sends_ = 0;
  uint32_t send_sequence_ = 0;
  uint64_t bytes_sent_ = 0, bytes_queued_ = 0;

  // In.
  uint64_t receive_sequence_ = 0;          // of the next message to deliver
  std::map<uint64_t, UcxReceived> early_;  // arrived before an older one
  std::map<UcxReceive*, std::unique_ptr<UcxReceive>> receiving_;
  uint64_t held_bytes_ = 0;  // of early_ and receiving_
};

}  // namespace icecache
