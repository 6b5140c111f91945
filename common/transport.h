// Transport: the data-plane seam. Ordered, framed messages between two processes; shared memory, TCP or
// RDMA is UCX's choice behind ucx_transport, not a class of ours. The deterministic twin is
// loopback_transport (seeded loss, delay, reorder and death). Both pass
// tests/conformance/transport_suite.h.
//
// Thread: a transport and its endpoints belong to one Reactor's thread. Nothing here has deadlines or
// retries; that is Channel (common/channel.h), which everybody uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/reactor.h"
#include "common/receive_buffers.h"
#include "common/status.h"

namespace icecache {

// A message to send: fixed header, meta (Cap'n Proto, common/wire/data.capnp), then body parts that are gathered
// without a copy of ours (pages straight from the arena).
struct OutMessage {
  uint16_t kind = 0;            // what meta is; data_codec.h has the kinds
  uint16_t flags = 0;
  uint64_t id = 0;              // request id, echoed by the reply
  Duration patience{0};         // how long the sender waits for the answer; 0: not said
  std::vector<std::byte> meta;
  std::vector<std::span<const std::byte>> body;
  std::shared_ptr<const void> pin;  // keeps what body points to alive until the transport lets go of it
};

// A received message, valid during the handler only. meta is 8-byte aligned; body is not.
struct InMessage {
  uint16_t kind = 0;
  uint16_t flags = 0;
  uint64_t id = 0;
  std::span<const std::byte> meta;
  std::span<const std::byte> body;
  Duration patience{0};  // of the sender, from now on, in steps of 10 ms and at most 655 s; 0: unknown
  // Where meta and body lie, if the transport can do without: a handler may move it away, and the
  // message is valid as long as the buffer is. The buffer goes before the transport.
  ReceiveBuffers::Buffer* buffer = nullptr;
};

// Memory of this process that peers may read by themselves, without a thread of this process taking
// part (RDMA). Ends with the object, which must go before the memory and before the transport.
class ReadableMemory {
 public:
  virtual ~ReadableMemory() = default;
  // What a peer needs to read all of it, and nothing else: a secret. At most kMemoryKeyBytesMax.
  virtual std::span<const std::byte> key() const = 0;
};
// Bytes of a peer's memory from `offset` on.
struct MemoryRead {
  std::span<const std::byte> key;
  uint64_t offset = 0;
  std::span<std::byte> to;
};

class Endpoint {
 public:
  virtual ~Endpoint() = default;  // closes

  // Queues the message; it is delivered in order and once, or on_closed runs. After on_closed: dropped.
  virtual void Send(OutMessage message) = 0;

  // Handlers; set right after the endpoint is made, before the loop turns again. on_closed runs at most once,
  // never from inside Send or Close, and not after the endpoint is destroyed. The endpoint may be destroyed
  // inside either handler.
  virtual void SetHandlers(std::function<void(const InMessage&)> on_message,
                           std::function<void(Status)> on_closed) = 0;

  // Reads memory that the peer has made readable. `done` runs at most once, on a later turn: OK when
  // all of it is here, OUT_OF_RANGE, INVALID_ARGUMENT (the key), UNAVAILABLE; not after Close. Where
  // the network cannot read by itself it may never run, so callers bound their wait. `pin` keeps the
  // memory behind `to` alive until the transport lets go of it. REQUIRES: a message has come.
  virtual void Read(std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
                    std::function<void(Status)> done) = 0;

  // Drops what is queued and ends the connection; the peer's on_closed runs.
  virtual void Close() = 0;

  virtual uint64_t bytes_sent() const = 0;
  virtual uint64_t bytes_queued() const = 0;   // accepted by Send and not yet handed over
  virtual std::string Describe() const = 0;    // peer and lanes, for logs and /status
};

class Transport {
 public:
  virtual ~Transport() = default;

  // Accepts connections at "host:port" (port 0: any free one). on_accept runs for each.
  // UNAVAILABLE with the remedy when the address is taken. At most one Listen per transport.
  virtual Result<std::string> Listen(const std::string& address,
                                     std::function<void(std::unique_ptr<Endpoint>)> on_accept) = 0;

  // Starts a connection; a failure arrives as on_closed. INVALID_ARGUMENT for a bad address.
  virtual Result<std::unique_ptr<Endpoint>> Connect(const std::string& address) = 0;

  // Registers memory for peers' reads; on RDMA that pins it (ulimit -l). RESOURCE_EXHAUSTED.
  virtual Result<std::unique_ptr<ReadableMemory>> MakeReadable(std::span<std::byte> memory) = 0;

  // What the transport chose and why, for the start-up log: "ucx 1.13.1: posix cma tcp; ...".
  virtual std::string Describe() const = 0;
};

struct UcxOptions {
  std::string transports;  // UCX_TLS; empty: posix,cma,tcp,self unless the user's environment says otherwise
  // For a side that reads its peers' memory. Where UCX emulates that in software, its peers may then read
  // and write all memory of this process, whatever keys they have: not for servers.
  bool reads = false;
};
// Attaches itself to the reactor. UNAVAILABLE with UCX's reason when it cannot start.
// Settings that correctness depends on are applied in code when the environment does not set them
// (ucx_environment.h lists them with reasons).
Result<std::unique_ptr<Transport>> MakeUcxTransport(Reactor& reactor, const UcxOptions& options);

// Deterministic twin. All transports made from one LoopbackNetwork reach each other by address.
struct LoopbackFaults {
  uint64_t seed = 1;
  Duration delay_min{0};
  Duration delay_max{0};     // uniform; messages of one endpoint stay in order
  double loss = 0;           // probability that a message vanishes and the connection breaks some time later
  double death = 0;          // probability per message that the connection breaks at once
  double silence = 0;        // probability per message that the peer falls silent for ever (SIGSTOP, cable cut)
};
class LoopbackNetwork;
std::shared_ptr<LoopbackNetwork> MakeLoopbackNetwork(const LoopbackFaults& faults);
std::unique_ptr<Transport> MakeLoopbackTransport(Reactor& reactor, std::shared_ptr<LoopbackNetwork> network);

}  // namespace icecache
