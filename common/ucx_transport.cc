// The data plane over UCX: one context per transport, a worker for its listener, and a worker for
// each connection (ucx_connection.h says why). Settings and their reasons: ucx_environment.h.

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
#include "common/size.h"
#include "common/transport.h"
#include "common/ucx_connection.h"
#include "common/ucx_environment.h"
#include "common/ucx_missed_events.h"
#include "common/ucx_peer.h"

namespace icecache {
namespace {

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
  void Read(std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
            std::function<void(Status)> done) override {
    connection_->Read(reads, std::move(pin), std::move(done));
  }
  void Close() override { connection_->Close(); }
  uint64_t bytes_sent() const override { return connection_->bytes_sent(); }
  uint64_t bytes_queued() const override { return connection_->bytes_queued(); }
  std::string Describe() const override { return connection_->Describe(); }

 private:
  const std::shared_ptr<UcxConnection> connection_;
};

class UcxReadable final : public ReadableMemory {
 public:
  UcxReadable(ucp_context_h context, ucp_mem_h handle, std::vector<std::byte> key)
      : context_(context), handle_(handle), key_(std::move(key)) {}
  ~UcxReadable() override { ucp_mem_unmap(context_, handle_); }
  std::span<const std::byte> key() const override { return key_; }

 private:
  const ucp_context_h context_;
  const ucp_mem_h handle_;
  const std::vector<std::byte> key_;
};

// Pumps the listener's worker; connections are pumped by themselves.
class UcxTransport final : public Transport, public Pollable {
 public:
  explicit UcxTransport(Reactor& reactor) : core_(reactor) {}
  ~UcxTransport() override;

  Status Start(const UcxOptions& options);

  Result<std::string> Listen(const std::string& address,
                             std::function<void(std::unique_ptr<Endpoint>)> on_accept) override;
  Result<std::unique_ptr<Endpoint>> Connect(const std::string& address) override;
  Result<std::unique_ptr<ReadableMemory>> MakeReadable(std::span<std::byte> memory) override;
  std::string Describe() const override { return description_; }

  bool Progress() override;
  int event_fd() const override { return event_fd_; }
  bool Arm() override;

 private:
  void StopListening();
  void Accept(ucp_conn_request_h request);

  static void OnConnection(ucp_conn_request_h request, void* self);

  UcxCore core_;
  std::string description_;
  ucp_worker_h worker_ = nullptr;  // the listener's; none without one
  int event_fd_ = -1;
  ucp_listener_h listener_ = nullptr;
  std::string listening_;
  std::function<void(std::unique_ptr<Endpoint>)> on_accept_;
  std::vector<ucp_conn_request_h> requests_;  // noted by UCX's callback, accepted by Progress
};

Status Failed(const char* what, ucs_status_t status) {
  return Unavailable(std::string("UCX cannot start: ") + what + ": " + ucs_status_string(status));
}

Status UcxTransport::Start(const UcxOptions& options) {
  const char* from_environment = std::getenv("UCX_TLS");
  const std::string transports = !options.transports.empty() ? options.transports
                                 : from_environment          ? from_environment
                                                             : "all";
  if (!UcxNotesAreDropped()) {
    LogWarn("UCX keeps its own notes of missed events and may end this process when peers give up",
            {{"remedy", "link libucs as a shared library"}});
  }
  core_.shared_memory = UsesSharedMemory(transports);
  if (core_.shared_memory) KV_RETURN_IF_ERROR(CheckSharedMemory(kUcxSharedBytesPerWorker));
  ucp_config_t* config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return Failed("reading the configuration", status);
  if (!options.transports.empty()) {
    status = ucp_config_modify(config, "TLS", options.transports.c_str());
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP | (options.reads ? UCP_FEATURE_RMA : 0);
  params.name = "icecache";
  if (status == UCS_OK) status = ucp_init(&params, config, &core_.context);
  ucp_config_release(config);
  if (status != UCS_OK) {
    return Failed(
        ("transports '" + transports + "' (see ucx_info -d for those of this host)").c_str(),
        status);
  }
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  const bool cuda = ucp_context_query(core_.context, &attributes) == UCS_OK &&
                    (attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
  description_ = std::string("ucx ") + ucp_get_version_string() + ": transports " + transports +
                 (core_.shared_memory ? ", shared memory on one host and tcp between hosts"
                                      : ", no shared memory") +
                 (cuda ? ", built with CUDA" : ", without CUDA");
  return OkStatus();
}

UcxTransport::~UcxTransport() {
  KV_CHECK(!core_.delivering);  // a transport is not destroyed by its own handlers
  StopListening();
  const auto until = std::chrono::steady_clock::now() + kShutdownMax;
  const auto connections = core_.connections;  // Drain removes
  for (const auto& [pointer, connection] : connections) connection->Close();
  for (const auto& [pointer, connection] : connections) connection->Drain(until);
  if (core_.context != nullptr) ucp_cleanup(core_.context);
}

void UcxTransport::StopListening() {
  if (worker_ == nullptr) return;
  core_.reactor.Detach(this);
  if (listener_ != nullptr) {
    for (const ucp_conn_request_h request : requests_) ucp_listener_reject(listener_, request);
    ucp_listener_destroy(listener_);
  }
  ucp_worker_destroy(worker_);
  worker_ = nullptr;
  listener_ = nullptr;
  requests_.clear();
}

Result<std::string> UcxTransport::Listen(const std::string& address,
                                         std::function<void(std::unique_ptr<Endpoint>)> on_accept) {
  if (listener_ != nullptr) return FailedPrecondition("already listening at " + listening_);
  KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
  socklen_t length = 0;
  KV_ASSIGN_OR_RETURN(const sockaddr_storage storage, Resolve(parsed, true, &length));

  KV_RETURN_IF_ERROR(OpenUcxWorker(core_, &worker_, &event_fd_));
  core_.reactor.Attach(this);
  ucp_listener_params_t params{};
  params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&storage);
  params.sockaddr.addrlen = length;
  params.conn_handler.cb = &UcxTransport::OnConnection;
  params.conn_handler.arg = this;
  const ucs_status_t status = ucp_listener_create(worker_, &params, &listener_);
  if (status != UCS_OK) {
    listener_ = nullptr;
    StopListening();
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
  KV_RETURN_IF_ERROR(connection->OpenWorker());
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
  Status status = connection->OpenWorker();
  // Asked as late as can be.
  if (status.ok() && known && PeerHasClosed(attributes.client_address))
    status = Unavailable("it has given up and closed the connection");
  if (!status.ok()) {
    ucp_listener_reject(listener_, request);
  } else {
    status = connection->Open(UcxConnection::Role::kServer, params);  // rejects it on failure
  }
  if (!status.ok()) {
    return LogWarn("connection not accepted", {{"peer", peer}, {"reason", status.ToString()}});
  }
  on_accept_(std::make_unique<UcxEndpoint>(connection));
}

Result<std::unique_ptr<ReadableMemory>> UcxTransport::MakeReadable(std::span<std::byte> memory) {
  const auto failed = [&](const char* what, ucs_status_t status) {
    return ResourceExhausted(std::string(what) + " of " + FormatSize(memory.size()) +
                             " for peers' reads: " + ucs_status_string(status) +
                             "; RDMA pins it: ulimit -l unlimited");
  };
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_PROT;
  params.address = memory.data();
  params.length = memory.size();
  params.prot = UCP_MEM_MAP_PROT_LOCAL_READ | UCP_MEM_MAP_PROT_REMOTE_READ;
  ucp_mem_h handle = nullptr;
  ucs_status_t status = ucp_mem_map(core_.context, &params, &handle);
  if (status != UCS_OK) return failed("registering memory", status);
  void* rkey = nullptr;
  size_t rkey_bytes = 0;
  status = ucp_rkey_pack(core_.context, handle, &rkey, &rkey_bytes);
  if (status != UCS_OK) {
    ucp_mem_unmap(core_.context, handle);
    return failed("making a key", status);
  }
  auto readable =
      std::make_unique<UcxReadable>(core_.context, handle, PackUcxKey(memory, rkey, rkey_bytes));
  ucp_rkey_buffer_release(rkey);
  return std::unique_ptr<ReadableMemory>(std::move(readable));
}

bool UcxTransport::Progress() {
  const bool any = ucp_worker_progress(worker_) != 0;
  if (requests_.empty()) return any;
  KV_CHECK(!core_.delivering);
  core_.delivering = true;
  for (const ucp_conn_request_h request : std::exchange(requests_, {})) Accept(request);
  core_.delivering = false;
  return true;
}

bool UcxTransport::Arm() { return requests_.empty() && ucp_worker_arm(worker_) != UCS_ERR_BUSY; }

}  // namespace

Result<std::unique_ptr<Transport>> MakeUcxTransport(Reactor& reactor, const UcxOptions& options) {
  ApplyUcxEnvironment();
  auto transport = std::make_unique<UcxTransport>(reactor);
  KV_RETURN_IF_ERROR(transport->Start(options));
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace icecache
