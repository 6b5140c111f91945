// The data plane over UCX: one context, one worker and at most one listener per transport, pumped
// by its reactor. Connections: ucx_connection.h. Settings and their reasons: ucx_environment.h.

#include <arpa/inet.h>
#include <netdb.h>
#include <ucp/api/ucp.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/address.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/transport.h"
#include "common/ucx_connection.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

// One turn makes UCX progress at most this often before messages are delivered.
constexpr int kProgressPerTurn = 4;
constexpr auto kShutdownMax = std::chrono::milliseconds(500);

Result<sockaddr_storage> Resolve(const HostPort& address, bool listen, socklen_t* length) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (listen ? AI_PASSIVE : 0);
  const std::string port = std::to_string(address.port);
  const int error = ::getaddrinfo(address.host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) {
    return InvalidArgument("address " + FormatHostPort(address) + ": " + ::gai_strerror(error));
  }
  sockaddr_storage storage{};
  std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
  *length = found->ai_addrlen;
  ::freeaddrinfo(found);
  return storage;
}

std::string AddressText(const sockaddr_storage& storage) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  const auto* address = reinterpret_cast<const sockaddr*>(&storage);
  const socklen_t length =
      storage.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
  if (::getnameinfo(address, length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "unknown address";
  }
  return FormatHostPort({host, static_cast<uint16_t>(std::atoi(port))});
}

// The handle that users own. The connection outlives it until UCX has let go of everything.
class UcxEndpoint final : public Endpoint {
 public:
  explicit UcxEndpoint(std::shared_ptr<UcxConnection> connection)
      : connection_(std::move(connection)) {}
  ~UcxEndpoint() override { connection_->Close(); }

  void Send(OutMessage message) override { connection_->Send(std::move(message)); }
  void SetHandlers(std::function<void(const InMessage&)> on_message,
                   std::function<void(Status)> on_closed) override {
    connection_->SetHandlers(std::move(on_message), std::move(on_closed));
  }
  void Close() override { connection_->Close(); }
  uint64_t bytes_sent() const override { return connection_->bytes_sent(); }
  uint64_t bytes_queued() const override { return connection_->bytes_queued(); }
  std::string Describe() const override { return connection_->Describe(); }

 private:
  const std::shared_ptr<UcxConnection> connection_;
};

class UcxTransport final : public Transport, public Pollable {
 public:
  explicit UcxTransport(Reactor& reactor) : reactor_(reactor) {}
  ~UcxTransport() override;

  Status Start(const UcxOptions& options);

  Result<std::string> Listen(const std::string& address,
                             std::function<void(std::unique_ptr<Endpoint>)> on_accept) override;
  Result<std::unique_ptr<Endpoint>> Connect(const std::string& address) override;
  std::string Describe() const override { return description_; }

  bool Progress() override;
  int event_fd() const override { return event_fd_; }
  bool Arm() override;
  // Shared memory does not tell a sender that its peer has made room.
  bool has_silent_work() const override { return core_.incomplete_sends > 0; }

 private:
  Status StartContext(const UcxOptions& options);
  Status StartWorker();
  void Accept(ucp_conn_request_h request);
  bool DeliverReady();
  bool TendConnections();

  static ucs_status_t OnMessage(void* self, const void* header, size_t header_bytes, void* data,
                                size_t data_bytes, const ucp_am_recv_param_t* param);
  static void OnConnection(ucp_conn_request_h request, void* self);

  Reactor& reactor_;
  ucp_context_h context_ = nullptr;
  UcxCore core_;
  ucp_listener_h listener_ = nullptr;
  std::string listening_;
  std::string description_;
  std::function<void(std::unique_ptr<Endpoint>)> on_accept_;
  std::vector<ucp_conn_request_h> requests_;  // noted by UCX's callback, accepted by Progress
  int event_fd_ = -1;
  bool attached_ = false;
  bool delivering_ = false;
};

Status Failed(const char* what, ucs_status_t status) {
  return Unavailable(std::string("UCX cannot start: ") + what + ": " + ucs_status_string(status));
}

Status UcxTransport::Start(const UcxOptions& options) {
  KV_RETURN_IF_ERROR(StartContext(options));
  KV_RETURN_IF_ERROR(StartWorker());
  reactor_.Attach(this);
  attached_ = true;
  return OkStatus();
}

Status UcxTransport::StartContext(const UcxOptions& options) {
  const char* from_environment = std::getenv("UCX_TLS");
  const std::string transports = !options.transports.empty() ? options.transports
                                 : from_environment          ? from_environment
                                                             : "all";
  if (UsesSharedMemory(transports)) {
    KV_RETURN_IF_ERROR(CheckSharedMemory(kUcxSharedBytesPerTransport));
  }
  ucp_config_t* config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return Failed("reading the configuration", status);
  if (!options.transports.empty()) {
    status = ucp_config_modify(config, "TLS", options.transports.c_str());
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "icecache";
  if (status == UCS_OK) status = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  if (status != UCS_OK) {
    return Failed(
        ("transports '" + transports + "' (see ucx_info -d for those of this host)").c_str(),
        status);
  }
  description_ = std::string("ucx ") + ucp_get_version_string() + ": transports " + transports +
                 (UsesSharedMemory(transports) ? ", shared memory on one host and tcp between hosts"
                                               : ", no shared memory");
  return OkStatus();
}

Status UcxTransport::StartWorker() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_, &params, &core_.worker);
  if (status != UCS_OK) return Failed("creating a worker", status);

  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &UcxTransport::OnMessage;
  handler.arg = this;
  // Under every id, although only kUcxMessageId is sent: UCX 1.13 crashes when messages of several
  // fragments come under an id without a handler, so a peer's nonsense would end the process. Costs
  // 1 ms and 1.5 MiB.
  for (unsigned id = 0; id <= UINT16_MAX; ++id) {
    handler.id = id;
    status = ucp_worker_set_am_recv_handler(core_.worker, &handler);
    if (status != UCS_OK) return Failed("setting the message handler", status);
  }

  status = ucp_worker_get_efd(core_.worker, &event_fd_);
  if (status != UCS_OK) return Failed("getting the event descriptor", status);
  return OkStatus();
}

UcxTransport::~UcxTransport() {
  KV_CHECK(!delivering_);  // a transport is not destroyed by its own handlers
  if (attached_) reactor_.Detach(this);
  if (listener_ != nullptr) {
    for (const ucp_conn_request_h request : requests_) ucp_listener_reject(listener_, request);
    ucp_listener_destroy(listener_);
  }
  core_.ready.clear();
  core_.attention.clear();
  const auto connections = core_.connections;  // Close does not remove, but keeps them in order
  for (const auto& [pointer, connection] : connections) connection->Close();
  if (core_.worker != nullptr) {
    const auto until = std::chrono::steady_clock::now() + kShutdownMax;
    const auto unfinished = [&] {
      for (const auto& [pointer, connection] : connections) {
        if (!connection->Finished()) return true;
      }
      return false;
    };
    while (unfinished() && std::chrono::steady_clock::now() < until) {
      ucp_worker_progress(core_.worker);
    }
    core_.ready.clear();
    ucp_worker_destroy(core_.worker);
    core_.worker = nullptr;
  }
  // After the worker is gone nothing reads the buffers of sends that never completed.
  for (const auto& [pointer, connection] : connections) connection->Orphan();
  if (context_ != nullptr) ucp_cleanup(context_);
}

Result<std::string> UcxTransport::Listen(const std::string& address,
                                         std::function<void(std::unique_ptr<Endpoint>)> on_accept) {
  if (listener_ != nullptr) return FailedPrecondition("already listening at " + listening_);
  KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
  socklen_t length = 0;
  KV_ASSIGN_OR_RETURN(const sockaddr_storage storage, Resolve(parsed, true, &length));

  ucp_listener_params_t params{};
  params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&storage);
  params.sockaddr.addrlen = length;
  params.conn_handler.cb = &UcxTransport::OnConnection;
  params.conn_handler.arg = this;
  const ucs_status_t status = ucp_listener_create(core_.worker, &params, &listener_);
  if (status != UCS_OK) {
    listener_ = nullptr;
    return Unavailable("cannot listen at " + address + ": " + ucs_status_string(status) +
                       "; choose another port (0: any free one), or stop the process that has it");
  }
  ucp_listener_attr_t attributes{};
  attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  KV_CHECK(ucp_listener_query(listener_, &attributes) == UCS_OK);
  listening_ = AddressText(attributes.sockaddr);
  on_accept_ = std::move(on_accept);
  return listening_;
}

Result<std::unique_ptr<Endpoint>> UcxTransport::Connect(const std::string& address) {
  KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
  if (parsed.port == 0)
    return InvalidArgument("address '" + address + "': port 0 cannot be reached");
  socklen_t length = 0;
  KV_ASSIGN_OR_RETURN(const sockaddr_storage storage, Resolve(parsed, false, &length));
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&storage);
  params.sockaddr.addrlen = length;
  const auto connection = std::make_shared<UcxConnection>(core_, FormatHostPort(parsed));
  KV_RETURN_IF_ERROR(connection->Open(UcxConnection::Role::kClient, params));
  return std::unique_ptr<Endpoint>(std::make_unique<UcxEndpoint>(connection));
}

void UcxTransport::OnConnection(ucp_conn_request_h request, void* self) {
  static_cast<UcxTransport*>(self)->requests_.push_back(request);
}

void UcxTransport::Accept(ucp_conn_request_h request) {
  ucp_conn_request_attr_t attributes{};
  attributes.field_mask = UCP_CONN_REQUEST_ATTR_FIELD_CLIENT_ADDR;
  const bool known = ucp_conn_request_query(request, &attributes) == UCS_OK;
  const std::string peer = known ? AddressText(attributes.client_address) : "unknown address";
  if (core_.connections.size() >= limits::kConnectionsMax) {
    LogWarn("connection refused: too many", {{"peer", peer}});
    ucp_listener_reject(listener_, request);
    return;
  }
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
  params.conn_request = request;
  const auto connection = std::make_shared<UcxConnection>(core_, peer);
  if (const Status status = connection->Open(UcxConnection::Role::kServer, params); !status.ok()) {
    return LogWarn("connection not accepted", {{"peer", peer}, {"reason", status.ToString()}});
  }
  on_accept_(std::make_unique<UcxEndpoint>(connection));
}

ucs_status_t UcxTransport::OnMessage(void* self, const void* header, size_t header_bytes,
                                     void* data, size_t data_bytes,
                                     const ucp_am_recv_param_t* param) {
  UcxCore& core = static_cast<UcxTransport*>(self)->core_;
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  const bool has_endpoint = (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0;
  const auto found = has_endpoint ? core.by_endpoint.find(param->reply_ep) : core.by_endpoint.end();
  if (found == core.by_endpoint.end()) return rendezvous ? UCS_ERR_CANCELED : UCS_OK;  // closed
  return found->second->Receive(header, header_bytes, data, data_bytes, param->recv_attr);
}

bool UcxTransport::DeliverReady() {
  if (core_.ready.empty()) return false;
  // What arrives while handlers run is delivered in the next turn.
  for (size_t n = core_.ready.size(); n > 0; --n) {
    const auto [connection, received] = std::move(core_.ready.front());
    core_.ready.pop_front();
    connection->Deliver(received);
  }
  return true;
}

bool UcxTransport::TendConnections() {
  if (core_.attention.empty()) return false;
  const auto connections = std::exchange(core_.attention, {});
  for (const auto& connection : connections) {
    connection->Tend();
    if (connection->Finished()) core_.connections.erase(connection.get());
  }
  return true;
}

bool UcxTransport::Progress() {
  KV_CHECK(!delivering_);
  delivering_ = true;
  bool any = false;
  // Stops at the first message: another look at the sockets (a system call) would delay it.
  for (int i = 0; i < kProgressPerTurn && core_.ready.empty(); ++i) {
    if (ucp_worker_progress(core_.worker) == 0) break;
    any = true;
  }
  if (!requests_.empty()) {
    any = true;
    for (const ucp_conn_request_h request : std::exchange(requests_, {})) Accept(request);
  }
  any |= DeliverReady();
  any |= TendConnections();
  if (!core_.released_pins.empty()) std::exchange(core_.released_pins, {}).clear();
  delivering_ = false;
  return any;
}

bool UcxTransport::Arm() {
  if (!requests_.empty() || !core_.ready.empty() || !core_.attention.empty()) return false;
  // Anything but OK and BUSY leaves the reactor's safety timer to pump.
  return ucp_worker_arm(core_.worker) != UCS_ERR_BUSY;
}

}  // namespace

Result<std::unique_ptr<Transport>> MakeUcxTransport(Reactor& reactor, const UcxOptions& options) {
  ApplyUcxEnvironment();
  auto transport = std::make_unique<UcxTransport>(reactor);
  KV_RETURN_IF_ERROR(transport->Start(options));
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace icecache
