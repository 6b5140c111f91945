#include "cacheserver/control_service.h"

#include <algorithm>
#include <deque>
#include <map>
#include <utility>

#include "cacheserver/listen.h"
#include "cacheserver/server_config.h"
#include "common/address.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

struct ControlService::Impl {
  Impl(Reactor& r, ContextService& c, const TenantTable& t, MetricsRegistry& m,
       ControlServiceOptions o)
      : reactor(r),
        contexts(c),
        tenants(t),
        options(std::move(o)),
        connection_gauge(
            m.GetGauge("icecache_control_connections", "Open control-plane connections.")),
        refused(m.GetCounter(
            "icecache_control_refused_total",
            "Control connections ended for bad frames, failed or late Hello, or silence.")),
        acceptor(r.io()) {}

  void Accept(const std::shared_ptr<Impl>& self);
  void Sweep(const std::weak_ptr<Impl>& weak);
  void Remove(ConnectionId id);

  Reactor& reactor;
  ContextService& contexts;
  const TenantTable& tenants;
  ControlServiceOptions options;
  Gauge& connection_gauge;
  Counter& refused;
  tcp::acceptor acceptor;
  bool accepting = false;
  std::map<ConnectionId, std::shared_ptr<Connection>> connections;
  uint64_t next_connection = 1;
  uint64_t requests_open = 0;
  Reactor::TimerId sweep = 0;
};

// One peer. Reads a frame, hands it over, reads the next; writes its queue one frame at a time.
// Lives in Impl's map and in its own socket operations; Close takes it out of the map, and whatever
// comes later finds it closed.
class ControlService::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Impl& impl, tcp::socket socket, ConnectionId id)
      : impl_(&impl),
        stream_(std::move(socket), impl.options.tls),
        id_(id),
        heard_(impl.reactor.clock().Now()) {
    error_code ignored;
    stream_.socket().set_option(tcp::no_delay(true), ignored);
    const tcp::endpoint peer = stream_.socket().remote_endpoint(ignored);
    peer_ = ignored ? "?" : EndpointText(peer);
  }

  void Start() {
    stream_.HandshakeAsServer([self = shared_from_this()](const error_code& error) {
      if (self->impl_ == nullptr) return;
      if (error) return self->Refuse("TLS: " + error.message());
      self->ReadHeader();
    });
  }

  // The owner goes away: nothing may touch it after this.
  void Abandon() {
    impl_ = nullptr;
    stream_.Close();
  }

  // impl_->connections loses it: call nothing of it afterwards except through a shared_ptr.
  void Close(const std::string& reason) {
    if (impl_ == nullptr) return;
    LogDebug("control connection closed", {{"peer", peer_}, {"reason", reason}});
    Impl* impl = std::exchange(impl_, nullptr);
    impl->requests_open -= open_;
    stream_.Close();
    impl->Remove(id_);
    if (tenant_) impl->contexts.EndConnection(id_);
  }

  // Every sweep. True: still wanted.
  void CheckTimes(TimePoint now) {
    if (!tenant_ && now - made_at() > limits::kHelloTimeout) return Refuse("no Hello in time");
    if (open_ > 0) {
      // Its peer waits for us: that is not silence.
      heard_ = now;
      impl_->contexts.Renew(id_);
      return;
    }
    if (now - heard_ > impl_->options.lease_time) Refuse("silent for longer than the lease time");
  }

  std::optional<TenantId> tenant() const { return tenant_; }
  const std::string& peer() const { return peer_; }

 private:
  TimePoint made_at() const { return heard_; }  // before Hello nothing moves heard_

  void Refuse(const std::string& reason) {
    impl_->refused.Add();
    LogInfo("control connection refused", {{"peer", peer_}, {"reason", reason}});
    Close(reason);
  }

  void ReadHeader() {
    auto self = shared_from_this();
    stream_.Read(header_, [self](const error_code& error) {
      if (self->impl_ == nullptr) return;
      if (error) return self->Close(error.message());
      Result<size_t> bytes = wire::FrameBytes(header_span(self->header_));
      if (!bytes.ok()) return self->FailFrame(bytes.status());
      self->ReadBody(*bytes);
    });
  }

  static std::span<const std::byte, wire::kFrameHeaderBytes> header_span(
      const std::array<std::byte, wire::kFrameHeaderBytes>& header) {
    return header;
  }

  void ReadBody(size_t frame_bytes) {
    frame_.resize(frame_bytes);
    std::copy(header_.begin(), header_.end(), frame_.begin());
    auto self = shared_from_this();
    stream_.Read(std::span(frame_).subspan(header_.size()), [self](const error_code& error) {
      if (self->impl_ == nullptr) return;
      if (error) return self->Close(error.message());
      self->HandleFrame();
    });
  }

  // Answers as far as possible and ends the connection: after a bad frame the stream has no next
  // one.
  void FailFrame(const Status& status) {
    impl_->refused.Add();
    LogInfo("control connection refused", {{"peer", peer_}, {"reason", status.ToString()}});
    closing_ = true;
    Send(0, status);
  }

  void HandleFrame() {
    Result<wire::ControlRequest> request = wire::DecodeRequest(frame_);
    // A request of a newer protocol decodes no further than its kind; like a broken one it ends the
    // connection.
    if (!request.ok()) return FailFrame(request.status());
    if (!tenant_) {
      HandleHello(*request);
      if (impl_ != nullptr && !closing_) ReadHeader();
      return;
    }
    heard_ = impl_->reactor.clock().Now();
    if (open_ >= limits::kControlRequestsInFlightMax) {
      Send(request->id,
           ResourceExhausted(
               "control: " + std::to_string(open_) +
               " requests are open on this connection, the maximum; wait for replies"));
    } else {
      ++open_;
      ++impl_->requests_open;
      impl_->contexts.Handle(id_, *tenant_, request->body,
                             [weak = weak_from_this(), id = request->id](ControlReplyBody body) {
                               const std::shared_ptr<Connection> self = weak.lock();
                               if (self == nullptr || self->impl_ == nullptr) return;
                               --self->open_;
                               --self->impl_->requests_open;
                               self->Send(id, std::move(body));
                             });
    }
    if (impl_ != nullptr && !closing_) ReadHeader();
  }

  void HandleHello(const wire::ControlRequest& request) {
    const auto* hello = std::get_if<wire::Hello>(&request.body);
    Status status;
    if (hello == nullptr) {
      status = Unauthenticated("the first request on a control connection must be Hello");
    } else if (hello->protocol_version != wire::kProtocolVersion) {
      status = Unimplemented("hello: protocol version " + std::to_string(hello->protocol_version) +
                             ", this server speaks " +
                             std::to_string(wire::kProtocolVersion) +
                             "; use worker and server of one release");
    } else if (Result<TenantId> tenant = impl_->tenants.Authenticate(hello->tenant, hello->secret);
               !tenant.ok()) {
      status = tenant.status();
    } else {
      tenant_ = *tenant;
      peer_ += " " + hello->client;
      heard_ = impl_->reactor.clock().Now();
      LogInfo("worker connected", {{"peer", peer_},
                                   {"tenant", impl_->tenants.Get(*tenant_).name},
                                   {"client", hello->client},
                                   {"tls", impl_->options.tls ? stream_.Describe() : "no"}});
      wire::HelloReply reply;
      reply.version = kServerVersion;
      reply.shards = ReachableShards();
      reply.heartbeat_ms = impl_->options.heartbeat_ms;
      return Send(request.id, std::move(reply));
    }
    impl_->refused.Add();
    LogInfo("control connection refused", {{"peer", peer_}, {"reason", status.ToString()}});
    closing_ = true;
    Send(request.id, status);
  }

  // A shard that listens on all addresses is reached at the one that this peer has reached us at.
  std::vector<std::string> ReachableShards() {
    std::vector<std::string> shards = impl_->options.shards;
    error_code error;
    const tcp::endpoint local = stream_.socket().local_endpoint(error);
    for (std::string& address : shards) {
      Result<HostPort> parsed = ParseHostPort(address);
      if (error || !parsed.ok() || (parsed->host != "0.0.0.0" && parsed->host != "::")) continue;
      address = FormatHostPort({local.address().to_string(), parsed->port});
    }
    return shards;
  }

  void Send(uint64_t id, ControlReplyBody body) {
    std::vector<std::byte> frame = wire::EncodeFrame(wire::ControlReply{id, std::move(body)});
    queued_bytes_ += frame.size();
    if (queued_bytes_ > limits::kControlReplyBytesQueuedMax)
      return Refuse("it does not read its replies");
    queue_.push_back(std::move(frame));
    if (queue_.size() == 1) WriteNext();
  }

  void WriteNext() {
    auto self = shared_from_this();
    stream_.Write(queue_.front(), [self](const error_code& error) {
      if (self->impl_ == nullptr) return;
      if (error) return self->Close(error.message());
      self->queued_bytes_ -= self->queue_.front().size();
      self->queue_.pop_front();
      if (!self->queue_.empty()) return self->WriteNext();
      if (self->closing_) self->Close("refused");
    });
  }

  Impl* impl_;  // nullptr: closed
  ControlStream stream_;
  const ConnectionId id_;
  std::string peer_;
  std::optional<TenantId> tenant_;  // set by Hello
  TimePoint heard_;
  uint32_t open_ = 0;
  bool closing_ = false;  // after the queue is written
  std::array<std::byte, wire::kFrameHeaderBytes> header_{};
  std::vector<std::byte> frame_;
  std::deque<std::vector<std::byte>> queue_;
  size_t queued_bytes_ = 0;
};

void ControlService::Impl::Remove(ConnectionId id) {
  connections.erase(id);
  connection_gauge.Set(static_cast<int64_t>(connections.size()));
}

void ControlService::Impl::Accept(const std::shared_ptr<Impl>& self) {
  acceptor.async_accept(
      [this, weak = std::weak_ptr<Impl>(self)](const error_code& error, tcp::socket socket) {
        const std::shared_ptr<Impl> alive = weak.lock();
        if (alive == nullptr || !accepting) return;
        if (error) {
          LogWarn("accept failed", {{"error", error.message()}});
          reactor.After(std::chrono::milliseconds(kAcceptPauseMs), [weak] {
            if (auto impl = weak.lock(); impl != nullptr && impl->accepting) impl->Accept(impl);
          });
          return;
        }
        if (connections.size() >= limits::kConnectionsMax) {
          refused.Add();
          LogWarn("control connection refused", {{"reason", "maximum of connections"}});
        } else {
          const ConnectionId id(next_connection++);
          auto connection = std::make_shared<Connection>(*this, std::move(socket), id);
          connections.emplace(id, connection);
          connection_gauge.Set(static_cast<int64_t>(connections.size()));
          connection->Start();
        }
        Accept(alive);
      });
}

void ControlService::Impl::Sweep(const std::weak_ptr<Impl>& weak) {
  contexts.Sweep();
  const TimePoint now = reactor.clock().Now();
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [id, connection] : connections) all.push_back(connection);
  for (const auto& connection : all) connection->CheckTimes(now);
  // A quarter of the lease time late at most, and never busier than 20 times a second.
  const Duration interval = std::clamp<Duration>(
      options.lease_time / 8, std::chrono::milliseconds(50), limits::kMergeInterval);
  sweep = reactor.After(interval, [weak] {
    if (auto impl = weak.lock()) impl->Sweep(weak);
  });
}

ControlService::ControlService(Reactor& reactor, ContextService& contexts,
                               const TenantTable& tenants, MetricsRegistry& metrics,
                               ControlServiceOptions options)
    : impl_(std::make_shared<Impl>(reactor, contexts, tenants, metrics, std::move(options))) {
  impl_->Sweep(impl_);
}

ControlService::~ControlService() {
  StopAccepting();
  impl_->reactor.Cancel(impl_->sweep);
  for (const auto& [id, connection] : impl_->connections) connection->Abandon();
  impl_->connections.clear();
}

Result<std::string> ControlService::Listen(const std::string& host, uint16_t port) {
  KV_ASSIGN_OR_RETURN(impl_->acceptor, ListenTcp(impl_->reactor.io(), host, port, "--port"));
  impl_->accepting = true;
  impl_->Accept(impl_);
  return EndpointText(impl_->acceptor.local_endpoint());
}

void ControlService::StopAccepting() {
  impl_->accepting = false;
  error_code ignored;
  impl_->acceptor.close(ignored);
}

void ControlService::SetTls(std::shared_ptr<TlsContext> tls) { impl_->options.tls = std::move(tls); }

void ControlService::CloseInactiveTenants() {
  std::vector<std::shared_ptr<Connection>> gone;
  for (const auto& [id, connection] : impl_->connections) {
    const std::optional<TenantId> tenant = connection->tenant();
    if (tenant && !impl_->tenants.Get(*tenant).active) gone.push_back(connection);
  }
  for (const auto& connection : gone) connection->Close("its tenant is gone from the token file");
}

std::string ControlService::PeerOf(ConnectionId id) const {
  const auto it = impl_->connections.find(id);
  return it == impl_->connections.end() ? "" : it->second->peer();
}

size_t ControlService::connection_count() const { return impl_->connections.size(); }
uint64_t ControlService::requests_open() const { return impl_->requests_open; }

}  // namespace icecache
