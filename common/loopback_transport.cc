// The deterministic twin of ucx_transport: messages are handed over in memory, on the reactor's
// clock, with faults drawn from one seeded generator. It keeps body and pin of a message until
// delivery, as UCX does for large messages, so that a caller who frees pages too early is found by
// the sanitizers here.
//
// Transports of one network may live in one reactor (then everything is a function of the seed) or
// in several threads: a side is touched by its own thread only, everything else travels through
// Mailbox::Post.

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <utility>

#include "common/address.h"
#include "common/limits.h"
#include "common/transport.h"

namespace icecache {
namespace {

constexpr uint16_t kFirstFreePort = 40000;
constexpr Duration kLossNoticedAfterMax = std::chrono::milliseconds(50);

// A transport's address for other threads. Drops what arrives after the transport is gone.
class Mailbox {
 public:
  explicit Mailbox(Reactor& reactor) : reactor_(&reactor) {}
  // False, and fn is not run, when the transport is gone.
  bool Post(std::function<void()> fn) {
    std::lock_guard lock(mutex_);
    if (reactor_ == nullptr) return false;
    reactor_->Post(std::move(fn));
    return true;
  }
  void Close() {
    std::lock_guard lock(mutex_);
    reactor_ = nullptr;
  }

 private:
  std::mutex mutex_;
  Reactor* reactor_;
};

struct Handlers {
  std::function<void(const InMessage&)> on_message;
  std::function<void(Status)> on_closed;
};

// One end of a connection. Members are touched by the owner's thread only, except the constants.
struct Side : std::enable_shared_from_this<Side> {
  Side(Reactor& r, std::shared_ptr<Mailbox> own, std::shared_ptr<Mailbox> far, std::string name)
      : reactor(r), mailbox(std::move(own)), peer_mailbox(std::move(far)), peer(std::move(name)) {}

  Reactor& reactor;
  const std::shared_ptr<Mailbox> mailbox, peer_mailbox;
  const std::string peer;
  std::weak_ptr<Side> other;  // set once, before either side runs

  struct Arrival {
    TimePoint at;
    std::unique_ptr<OutMessage> message;
  };
  std::shared_ptr<Handlers> handlers;  // null when the endpoint is gone or closed
  std::deque<Arrival> inbox;           // in order of sending; `at` never decreases
  Reactor::TimerId timer = 0;
  bool closed = false;    // nothing is sent or delivered any more
  bool silent = false;    // nothing gets through in either direction, and nobody is told
  bool breaking = false;  // a message was lost: nothing after it may arrive
  uint64_t bytes_sent = 0, bytes_queued = 0;

  void Arrive(std::unique_ptr<OutMessage> message, Duration delay);
  void DeliverDue();
  void Deliver(const OutMessage& message);
  void GiveBack(std::unique_ptr<OutMessage> message);
  // Ends this side; on_closed runs with `status` unless it is OK.
  void End(Status status);
};

uint64_t MessageBytes(const OutMessage& message) {
  uint64_t bytes = message.meta.size();
  for (const auto& part : message.body) bytes += part.size();
  return bytes;
}

// The pin belongs to the sender's thread: it is let go there, whatever became of the message.
void ReturnToSender(Mailbox& mailbox, std::weak_ptr<Side> weak,
                    std::unique_ptr<OutMessage> message) {
  const auto shared = std::make_shared<std::unique_ptr<OutMessage>>(std::move(message));
  mailbox.Post([weak = std::move(weak), shared] {
    const auto side = weak.lock();
    if (side != nullptr && !side->closed) side->bytes_queued -= MessageBytes(**shared);
    shared->reset();
  });
}

void Side::Arrive(std::unique_ptr<OutMessage> message, Duration delay) {
  if (closed || silent) return GiveBack(std::move(message));
  TimePoint at = reactor.clock().Now() + delay;
  if (!inbox.empty()) at = std::max(at, inbox.back().at);
  inbox.push_back({at, std::move(message)});
  DeliverDue();
}

void Side::DeliverDue() {
  const auto self = shared_from_this();  // a handler may destroy the endpoint
  while (!closed && !inbox.empty() && inbox.front().at <= reactor.clock().Now()) {
    std::unique_ptr<OutMessage> message = std::move(inbox.front().message);
    inbox.pop_front();
    if (!silent) Deliver(*message);
    GiveBack(std::move(message));
  }
  if (closed || inbox.empty()) return;
  reactor.Cancel(timer);
  timer = reactor.After(inbox.front().at - reactor.clock().Now(), [weak = weak_from_this()] {
    if (const auto side = weak.lock()) side->DeliverDue();
  });
}

void Side::Deliver(const OutMessage& message) {
  const std::shared_ptr<Handlers> current = handlers;
  if (current == nullptr || !current->on_message) return;
  uint64_t body_bytes = 0;
  for (const auto& part : message.body) body_bytes += part.size();
  // operator new aligns to 16, as meta needs.
  const std::vector<std::byte> meta(message.meta);
  std::vector<std::byte> body;
  body.reserve(body_bytes);
  for (const auto& part : message.body) body.insert(body.end(), part.begin(), part.end());
  InMessage in;
  in.kind = message.kind;
  in.flags = message.flags;
  in.id = message.id;
  in.meta = meta;
  in.body = body;
  in.patience = message.patience;
  current->on_message(in);
}

void Side::GiveBack(std::unique_ptr<OutMessage> message) {
  ReturnToSender(*peer_mailbox, other, std::move(message));
}

void Side::End(Status status) {
  if (closed) return;
  closed = true;
  bytes_queued = 0;
  reactor.Cancel(timer);
  while (!inbox.empty()) {
    GiveBack(std::move(inbox.front().message));
    inbox.pop_front();
  }
  const std::shared_ptr<Handlers> current = std::move(handlers);
  handlers = nullptr;
  if (!status.ok() && current != nullptr && current->on_closed) current->on_closed(status);
}

void EndLater(Mailbox& mailbox, std::weak_ptr<Side> weak, Status status, Duration delay) {
  mailbox.Post([weak = std::move(weak), status = std::move(status), delay] {
    const auto side = weak.lock();
    if (side == nullptr || side->silent) return;
    if (delay <= Duration(0)) return side->End(status);
    side->reactor.After(delay, [weak, status] {
      if (const auto later = weak.lock(); later != nullptr && !later->silent) later->End(status);
    });
  });
}

}  // namespace

class LoopbackNetwork {
 public:
  explicit LoopbackNetwork(const LoopbackFaults& faults) : faults_(faults), random_(faults.seed) {}

  struct Listener {
    std::shared_ptr<Mailbox> mailbox;
    std::function<void(std::shared_ptr<Side>)> accept;  // on the listener's thread
    Reactor* reactor;
  };

  Result<std::string> Bind(HostPort address, Listener listener) {
    std::lock_guard lock(mutex_);
    if (address.port == 0) {
      do {
        address.port = next_port_++;
      } while (listeners_.contains(FormatHostPort(address)));
    }
    const std::string name = FormatHostPort(address);
    if (!listeners_.emplace(name, std::move(listener)).second) {
      return Unavailable("address " + name + " is in use: choose another port, or 0 for any");
    }
    return name;
  }
  void Unbind(const std::string& address) {
    std::lock_guard lock(mutex_);
    listeners_.erase(address);
  }
  std::optional<Listener> Find(const std::string& address) {
    std::lock_guard lock(mutex_);
    const auto it = listeners_.find(address);
    if (it == listeners_.end()) return std::nullopt;
    return it->second;
  }

  // Memory that may be read, by its key. Read and taken back under one lock: nobody reads what has
  // gone.
  uint64_t AddMemory(std::span<const std::byte> memory) {
    std::lock_guard lock(mutex_);
    memory_.emplace(next_key_, memory);
    return next_key_++;
  }
  void DropMemory(uint64_t key) {
    std::lock_guard lock(mutex_);
    memory_.erase(key);
  }
  Status ReadMemory(std::span<const std::byte> key, uint64_t offset, std::span<std::byte> to) {
    std::lock_guard lock(mutex_);
    uint64_t number = 0;
    if (key.size() == sizeof number) std::memcpy(&number, key.data(), sizeof number);
    const auto it = memory_.find(number);
    if (it == memory_.end()) return InvalidArgument("unknown memory key");
    if (to.size() > it->second.size() || offset > it->second.size() - to.size()) {
      return OutOfRange("a read behind the end of memory");
    }
    if (!to.empty()) std::memcpy(to.data(), it->second.data() + offset, to.size());
    return OkStatus();
  }

  struct Fate {
    Duration delay{0}, noticed_after{0};
    bool lost = false, death = false, silence = false;
  };
  // Always draws the same number of values, so that one fault does not shift all later ones.
  Fate Draw() {
    std::lock_guard lock(mutex_);
    const uint64_t loss = random_(), death = random_(), silence = random_();
    const uint64_t delay = random_(), noticed = random_();
    const auto happens = [](uint64_t bits, double probability) {
      return static_cast<double>(bits >> 11) * 0x1.0p-53 < probability;
    };
    const auto within = [](uint64_t bits, Duration span) {
      return Duration(static_cast<int64_t>(bits % (static_cast<uint64_t>(span.count()) + 1)));
    };
    Fate fate;
    fate.delay = faults_.delay_min +
                 within(delay, std::max(faults_.delay_max - faults_.delay_min, Duration(0)));
    fate.noticed_after = within(noticed, kLossNoticedAfterMax);
    fate.lost = happens(loss, faults_.loss);
    fate.death = happens(death, faults_.death);
    fate.silence = happens(silence, faults_.silence);
    return fate;
  }

 private:
  const LoopbackFaults faults_;
  std::mutex mutex_;
  std::mt19937_64 random_;
  std::map<std::string, Listener> listeners_;
  uint16_t next_port_ = kFirstFreePort;
  std::map<uint64_t, std::span<const std::byte>> memory_;
  uint64_t next_key_ = 1;
};

namespace {

class LoopbackReadable final : public ReadableMemory {
 public:
  LoopbackReadable(std::shared_ptr<LoopbackNetwork> network, std::span<const std::byte> memory)
      : network_(std::move(network)), number_(network_->AddMemory(memory)) {}
  ~LoopbackReadable() override { network_->DropMemory(number_); }
  std::span<const std::byte> key() const override { return std::as_bytes(std::span(&number_, 1)); }

 private:
  const std::shared_ptr<LoopbackNetwork> network_;
  const uint64_t number_;
};

class LoopbackEndpoint final : public Endpoint {
 public:
  LoopbackEndpoint(std::shared_ptr<Side> side, std::shared_ptr<LoopbackNetwork> network)
      : side_(std::move(side)), network_(std::move(network)) {}
  ~LoopbackEndpoint() override { Close(); }

  void Send(OutMessage message) override {
    if (side_->closed || side_->silent || side_->breaking) return;
    const LoopbackNetwork::Fate fate = network_->Draw();
    const uint64_t bytes = MessageBytes(message);
    side_->bytes_sent += bytes;
    if (fate.silence) {
      side_->silent = true;
      side_->peer_mailbox->Post([weak = side_->other] {
        if (const auto side = weak.lock()) side->silent = true;
      });
      return;
    }
    if (fate.death || fate.lost) {
      side_->breaking = true;
      const Status status = Unavailable("connection to " + side_->peer + " broke");
      const Duration after = fate.death ? Duration(0) : fate.noticed_after;
      EndLater(*side_->mailbox, side_, status, after);
      EndLater(*side_->peer_mailbox, side_->other, status, after);
      return;
    }
    side_->bytes_queued += bytes;
    const auto shared = std::make_shared<std::unique_ptr<OutMessage>>(
        std::make_unique<OutMessage>(std::move(message)));
    const bool posted =
        side_->peer_mailbox->Post([weak = side_->other, from = std::weak_ptr(side_),
                                   mailbox = side_->mailbox, shared, delay = fate.delay] {
          if (const auto side = weak.lock()) return side->Arrive(std::move(*shared), delay);
          ReturnToSender(*mailbox, from, std::move(*shared));
        });
    if (!posted) side_->bytes_queued -= bytes;
  }

  void SetHandlers(std::function<void(const InMessage&)> on_message,
                   std::function<void(Status)> on_closed) override {
    if (side_->closed) return;
    side_->handlers =
        std::make_shared<Handlers>(Handlers{std::move(on_message), std::move(on_closed)});
  }

  void Read(std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
            std::function<void(Status)> done) override {
    if (side_->closed) return;
    struct Part {
      std::vector<std::byte> key;
      uint64_t offset;
      std::span<std::byte> to;
    };
    std::vector<Part> parts;
    for (const MemoryRead& read : reads) {
      parts.push_back({{read.key.begin(), read.key.end()}, read.offset, read.to});
    }
    side_->reactor.After(network_->Draw().delay, [weak = std::weak_ptr(side_), network = network_,
                                                  parts = std::move(parts), pin = std::move(pin),
                                                  done = std::move(done)] {
      const auto side = weak.lock();
      if (side == nullptr || side->handlers == nullptr || side->silent) return;
      Status status;
      for (const Part& part : parts) {
        if (status.ok()) status = network->ReadMemory(part.key, part.offset, part.to);
      }
      done(std::move(status));
    });
  }

  void Close() override {
    if (side_->closed) return;
    const bool tell_peer = !side_->silent;
    side_->End(OkStatus());
    if (!tell_peer) return;
    EndLater(*side_->peer_mailbox, side_->other, Unavailable("closed by the peer"), Duration(0));
  }

  uint64_t bytes_sent() const override { return side_->bytes_sent; }
  uint64_t bytes_queued() const override { return side_->bytes_queued; }
  std::string Describe() const override { return side_->peer + " over loopback"; }

 private:
  const std::shared_ptr<Side> side_;
  const std::shared_ptr<LoopbackNetwork> network_;
};

class LoopbackTransport final : public Transport {
 public:
  LoopbackTransport(Reactor& reactor, std::shared_ptr<LoopbackNetwork> network)
      : reactor_(reactor),
        network_(std::move(network)),
        mailbox_(std::make_shared<Mailbox>(reactor)),
        state_(std::make_shared<State>()) {}

  ~LoopbackTransport() override {
    if (!bound_.empty()) network_->Unbind(bound_);
    for (const auto& weak : state_->sides) {
      const auto side = weak.lock();
      if (side == nullptr || side->closed) continue;
      if (!side->silent) {
        EndLater(*side->peer_mailbox, side->other, Unavailable("the peer is gone"), Duration(0));
      }
      side->End(OkStatus());
    }
    mailbox_->Close();
  }

  Result<std::string> Listen(const std::string& address,
                             std::function<void(std::unique_ptr<Endpoint>)> on_accept) override {
    if (!bound_.empty()) return FailedPrecondition("already listening at " + bound_);
    KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
    const auto accept = [state = state_, network = std::weak_ptr(network_),
                         on_accept = std::move(on_accept)](std::shared_ptr<Side> side) {
      const auto alive = network.lock();
      if (alive == nullptr) return;
      state->Add(side);
      on_accept(std::make_unique<LoopbackEndpoint>(std::move(side), alive));
    };
    KV_ASSIGN_OR_RETURN(bound_, network_->Bind(parsed, {mailbox_, accept, &reactor_}));
    return bound_;
  }

  Result<std::unique_ptr<Endpoint>> Connect(const std::string& address) override {
    KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
    const std::string name = FormatHostPort(parsed);
    const auto listener = network_->Find(name);
    const auto target = listener ? listener->mailbox : std::make_shared<Mailbox>(reactor_);
    const auto side = std::make_shared<Side>(reactor_, mailbox_, target, name);
    state_->Add(side);
    auto endpoint = std::make_unique<LoopbackEndpoint>(side, network_);
    if (!listener) {
      target->Close();
      EndLater(*mailbox_, side, Unavailable("nobody listens at " + name), Duration(0));
      return std::unique_ptr<Endpoint>(std::move(endpoint));
    }
    const auto remote =
        std::make_shared<Side>(*listener->reactor, listener->mailbox, mailbox_, "a client");
    side->other = remote;
    remote->other = side;
    if (!listener->mailbox->Post([accept = listener->accept, remote] { accept(remote); })) {
      EndLater(*mailbox_, side, Unavailable("nobody listens at " + name), Duration(0));
    }
    return std::unique_ptr<Endpoint>(std::move(endpoint));
  }

  Result<std::unique_ptr<ReadableMemory>> MakeReadable(std::span<std::byte> memory) override {
    return std::unique_ptr<ReadableMemory>(std::make_unique<LoopbackReadable>(network_, memory));
  }

  std::string Describe() const override {
    return "loopback: in-memory twin of the data plane, for tests";
  }

 private:
  // What must be told when the transport goes. Outlives it inside `accept`, empty by then.
  struct State {
    std::vector<std::weak_ptr<Side>> sides;
    void Add(const std::shared_ptr<Side>& side) {
      std::erase_if(sides, [](const auto& weak) { return weak.expired(); });
      sides.push_back(side);
    }
  };

  Reactor& reactor_;
  const std::shared_ptr<LoopbackNetwork> network_;
  const std::shared_ptr<Mailbox> mailbox_;
  const std::shared_ptr<State> state_;
  std::string bound_;
};

}  // namespace

std::shared_ptr<LoopbackNetwork> MakeLoopbackNetwork(const LoopbackFaults& faults) {
  return std::make_shared<LoopbackNetwork>(faults);
}

std::unique_ptr<Transport> MakeLoopbackTransport(Reactor& reactor,
                                                 std::shared_ptr<LoopbackNetwork> network) {
  return std::make_unique<LoopbackTransport>(reactor, std::move(network));
}

}  // namespace icecache
