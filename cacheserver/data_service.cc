#include "cacheserver/data_service.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "common/log.h"
#include "common/message_header.h"
#include "common/wire/select_batch_codec.h"

namespace icecache {
namespace {

constexpr Duration kSweepInterval = std::chrono::seconds(2);
constexpr std::array<const char*, 10> kKindNames = {
    "unknown",    "attach",      "put_rows",     "build",       "select",
    "fetch_rows", "fetch_pages", "select_batch", "extent_keys", "offer_memory"};

Histogram& StageHistogram(MetricsRegistry& metrics, const char* stage) {
  return metrics.GetHistogram(
      "icecache_select_seconds",
      "Server time of selections by stage: append of rows, choice of pages, gather of the reply.",
      {{"stage", stage}});
}

Counter& SelectionsOf(MetricsRegistry& metrics, const char* found) {
  return metrics.GetCounter("icecache_selections_total",
                            "Selections whose pages were all in memory, and those that had to wait "
                            "for the disk.",
                            {{"found", found}});
}

Counter& BytesOf(MetricsRegistry& metrics, const char* name, const char* transport) {
  return metrics.GetCounter(name,
                            "Bytes of data-plane messages, by the transport of their connection; "
                            "mapped: named to be read in the tenant's extents.",
                            {{"transport", transport}});
}

// Makes the message outlive its handler: without a copy where the transport can spare the memory.
std::shared_ptr<const void> TakeMemory(InMessage* message) {
  if (message->buffer != nullptr) {
    auto taken = std::make_shared<ReceiveBuffers::Buffer>(std::move(*message->buffer));
    message->buffer = nullptr;
    return taken;
  }
  const size_t meta_bytes = message->meta.size(), body_bytes = message->body.size();
  const size_t body_at = PaddedMetaBytes(meta_bytes);
  auto words = std::make_shared_for_overwrite<uint64_t[]>((body_at + body_bytes + 7) / 8);
  auto* const copy = reinterpret_cast<std::byte*>(words.get());
  std::copy(message->meta.begin(), message->meta.end(), copy);
  std::copy(message->body.begin(), message->body.end(), copy + body_at);
  message->meta = {copy, meta_bytes};
  message->body = {copy + body_at, body_bytes};
  return words;
}

// What UCX has chosen for a connection, in few words; "unknown" as long as it connects.
const char* TransportOf(const std::string& endpoint) {
  const size_t at = endpoint.find(" over ");
  if (at == std::string::npos) return "unknown";
  const std::string_view lanes = std::string_view(endpoint).substr(at + 6);
  if (lanes.starts_with("loopback")) return "loopback";
  if (lanes.find("(shared memory)") != std::string_view::npos) return "shared_memory";
  for (const char* rdma : {"rc", "dc", "ud"}) {
    if (lanes.starts_with(rdma)) return "rdma";
  }
  return lanes.starts_with("tcp") ? "tcp" : "other";
}

}  // namespace

DataService::DataService(Shard& shard, Reactor& reactor, MetricsRegistry& metrics,
                         const DataServiceOptions& options)
    : shard_(shard),
      reactor_(reactor),
      metrics_(metrics),
      options_(options),
      connection_gauge_(metrics.GetGauge("icecache_data_connections",
                                         "Open data-plane connections, by shard.",
                                         {{"shard", std::to_string(shard.options().id.value)}})),
      bytes_mapped_(BytesOf(metrics, "icecache_sent_bytes_total", "mapped")),
      pages_returned_(metrics.GetCounter("icecache_pages_sent_total",
                                         "Pages sent with content by selections.")),
      pages_resident_(metrics.GetCounter("icecache_pages_resident_total",
                                         "Pages selected that the worker already held.")),
      pages_mapped_(metrics.GetCounter("icecache_pages_mapped_total",
                                       "Pages named for reading in mapped memory.")),
      pages_pushed_(metrics.GetCounter("icecache_pages_pushed_total",
                                       "Pages written into memory of workers' GPUs.")),
      pages_attended_(metrics.GetCounter(
          "icecache_pages_attended_total",
          "Selected pages that the server attended to instead of sending them.")),
      tokens_read_(metrics.GetCounter("icecache_select_tokens_read_total",
                                      "Rows of K read exactly by selections.")),
      rows_received_(metrics.GetCounter("icecache_rows_received_total",
                                        "K/V rows received, counted per kv head.")),
      checks_(metrics.GetCounter("icecache_checks_total",
                                 "Heads of selections that were compared with exact attention.")),
      checks_skipped_(metrics.GetCounter(
          "icecache_checks_skipped_total",
          "Heads that were to be compared but had nothing indexed, too much, or pages on disk.")),
      checked_mass_(metrics.GetCounter(
          "icecache_checked_mass_ppm_total",
          "True share of attention mass in the returned pages, millionths, summed over checks.")),
      checked_error_(metrics.GetCounter(
          "icecache_checked_output_error_ppm_total",
          "Relative error of pages and residual, millionths, summed over checks.")),
      selections_warm_(SelectionsOf(metrics, "memory")),
      selections_cold_(SelectionsOf(metrics, "disk")),
      append_seconds_(StageHistogram(metrics, "append")),
      select_seconds_(StageHistogram(metrics, "select")),
      gather_seconds_(StageHistogram(metrics, "gather")) {
  sweep_ = reactor_.After(kSweepInterval, [this] { Sweep(); });
}

DataService::~DataService() {
  reactor_.Cancel(sweep_);
  connections_.clear();
}

void DataService::Accept(std::unique_ptr<Endpoint> endpoint) {
  if (!accepting_ || connections_.size() >= limits::kConnectionsMax) {
    LogWarn("data connection refused",
            {{"peer", endpoint->Describe()},
             {"reason", accepting_ ? "maximum of connections" : "the server is draining"}});
    return;  // the endpoint closes as it goes
  }
  auto connection = std::make_unique<Connection>();
  connection->id = next_connection_++;
  connection->last_attached = reactor_.clock().Now();
  ChannelOptions options;
  options.heartbeat_interval = options_.heartbeat_interval;
  options.heartbeat_misses =
      std::max(2, static_cast<int>(options_.peer_timeout / options_.heartbeat_interval));
  connection->channel = std::make_unique<Channel>(reactor_, std::move(endpoint), options);
  Connection& c = *connection;
  c.channel->SetHandler([this, &c](const InMessage& message) { Receive(c, message); });
  c.channel->SetOnClosed([this, id = c.id](const Status& status) {
    LogDebug("data connection closed", {{"reason", status.ToString()}});
    Close(id);
  });
  LogDebug("data connection", {{"peer", c.channel->endpoint().Describe()}});
  connections_.emplace(c.id, std::move(connection));
  connection_gauge_.Set(static_cast<int64_t>(connections_.size()));
}

void DataService::Close(uint64_t id) {
  auto node = connections_.extract(id);
  if (node.empty()) return;
  for (const RequestId put : node.mapped()->puts_behind) requests_.erase(put);
  node.mapped()->puts_behind.clear();
  connection_gauge_.Set(static_cast<int64_t>(connections_.size()));
  closed_.push_back(std::move(node.mapped()));
  if (closed_.size() > 1) return;
  reactor_.Post([this, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) closed_.clear();
  });
}

void DataService::Sweep() {
  const TimePoint now = reactor_.clock().Now();
  std::vector<uint64_t> idle;
  for (auto& [id, connection] : connections_) {
    for (auto it = connection->attached.begin(); it != connection->attached.end();) {
      const bool dead = shard_.FindLease(it->second) == nullptr;
      it = dead ? connection->attached.erase(it) : std::next(it);
    }
    if (!connection->attached.empty()) {
      connection->last_attached = now;
    } else {
      connection->push.reset();  // whoever lent it may have ended
    }
    if (now - connection->last_attached > limits::kAttachTimeout) idle.push_back(id);
  }
  for (uint64_t id : idle) {
    connections_.at(id)->channel->Close();
    Close(id);
  }
  sweep_ = reactor_.After(kSweepInterval, [this] { Sweep(); });
}

void DataService::Count(uint16_t kind, StatusCode code) {
  const size_t row = kind < kKindNames.size() ? kind : 0;
  Counter*& counter = counters_[row][static_cast<size_t>(code) & 15];
  if (counter == nullptr) {
    counter = &metrics_.GetCounter(
        "icecache_requests_total", "Data-plane requests by kind and result.",
        {{"kind", kKindNames[row]}, {"result", std::string(StatusCodeName(code))}});
  }
  counter->Add();
}

void DataService::CountBytes(Connection& connection, uint64_t sent, uint64_t received) {
  if (!connection.transport_known) {
    const std::string transport = TransportOf(connection.channel->endpoint().Describe());
    connection.transport_known = transport != "unknown";
    connection.bytes_sent = &BytesOf(metrics_, "icecache_sent_bytes_total", transport.c_str());
    connection.bytes_received =
        &BytesOf(metrics_, "icecache_received_bytes_total", transport.c_str());
  }
  connection.bytes_sent->Add(sent);
  connection.bytes_received->Add(received);
}

void DataService::Receive(Connection& connection, InMessage message) {
  CountBytes(connection, 0, message.meta.size() + message.body.size());
  std::shared_ptr<const void> memory;
  if (connection.tenant) memory = TakeMemory(&message);
  if (message.kind != wire::kSelectBatch) return Enqueue(connection, message, memory);
  const Result<std::vector<InMessage>> selects = wire::SplitSelects(message);
  if (!selects.ok()) return Refuse(connection, message, selects.status());
  Count(message.kind, StatusCode::kOk);
  for (const InMessage& select : *selects) Enqueue(connection, select, memory);
}

void DataService::Enqueue(Connection& connection, const InMessage& message,
                          const std::shared_ptr<const void>& memory) {
  if (!connection.tenant) return Handle(connection, message);
  TenantWork::Task task;
  task.bytes = message.meta.size() + message.body.size();
  task.deadline = EndOfPatience(message);
  const RequestId id = next_request_++;
  task.run = [this, id, alive = std::weak_ptr<int>(alive_)](const Status& status) {
    if (!alive.expired()) Serve(id, status);
  };
  const Status status = shard_.work().Submit(*connection.tenant, std::move(task));
  if (!status.ok()) return Refuse(connection, message, status);
  requests_.emplace(id, std::make_shared<Request>(Request{connection.id, message, memory, {}}));
}

void DataService::Refuse(Connection& connection, const InMessage& message, const Status& status) {
  Count(message.kind, status.code());
  connection.channel->ReplyError(message.id, status);
}

void DataService::Handle(Connection& connection, const InMessage& message) {
  Status status;
  if (connection.channel->endpoint().bytes_queued() > limits::kReplyBytesQueuedMax) {
    status = ResourceExhausted("the peer takes its replies too slowly: " +
                               std::to_string(connection.channel->endpoint().bytes_queued()) +
                               " bytes wait for it; read replies before sending more requests");
  } else {
    status = Dispatch(connection, message);
    if (status.code() == StatusCode::kResourceExhausted &&
        (message.kind == wire::kPutRows || message.kind == wire::kSelect)) {
      status = WaitForRoom(status);
    }
  }
  if (!status.ok()) Refuse(connection, message, status);  // else it is answered, or will be
}

Status DataService::Dispatch(Connection& connection, const InMessage& message) {
  switch (message.kind) {
    case wire::kAttach:
      return Attach(connection, message);
    case wire::kPutRows:
      return PutRows(connection, message);
    case wire::kBuild:
      return Build(connection, message);
    case wire::kSelect:
      return Select(connection, message);
    case wire::kFetchRows:
      return FetchRows(connection, message);
    case wire::kFetchPages:
      return FetchPages(connection, message);
    case wire::kExtentKeys:
      return GiveExtentKeys(connection, message);
    case wire::kOfferMemory:
      return OfferMemory(connection, message);
    default:
      return Unimplemented("request kind " + std::to_string(message.kind) +
                           " is not known to protocol version " +
                           std::to_string(wire::kProtocolVersion));
  }
}

void DataService::Reply(Connection& connection, const InMessage& request, OutMessage reply) {
  reply.kind = request.kind;
  uint64_t bytes = reply.meta.size();
  for (std::span<const std::byte> part : reply.body) bytes += part.size();
  CountBytes(connection, bytes, 0);
  Count(request.kind, StatusCode::kOk);
  connection.channel->Reply(request.id, std::move(reply));
}

Result<DataService::Fenced> DataService::Fence(const Connection& connection,
                                               const InMessage& message, bool write) const {
  KV_ASSIGN_OR_RETURN(const ContextId id, wire::PeekContext(message));
  const auto attached = connection.attached.find(id);
  if (attached == connection.attached.end()) {
    return PermissionDenied(
        "context " + std::to_string(id.value) +
        " is not attached on this connection; send Attach with the ticket of its grant first");
  }
  Fenced fenced;
  fenced.lease = shard_.FindLease(attached->second);
  if (fenced.lease == nullptr) {
    return FailedPrecondition("the lease of epoch " + std::to_string(attached->second.value) +
                              " on context " + std::to_string(id.value) +
                              " has ended; open or create the context again");
  }
  // Attach has checked both; a lease that changed hands would be a bug of ours.
  KV_CHECK(fenced.lease->context == id && fenced.lease->tenant == connection.tenant);
  if (write && !fenced.lease->writable) {
    return PermissionDenied("context " + std::to_string(id.value) +
                            " was opened to read; fork it to append to a context of your own");
  }
  fenced.context = shard_.FindContext(id);
  if (fenced.context == nullptr) {
    return NotFound("context " + std::to_string(id.value) + " was dropped");
  }
  return fenced;
}

Status DataService::CheckEpoch(const Fenced& fenced, Epoch epoch) const {
  if (epoch == fenced.lease->epoch) return OkStatus();
  return FailedPrecondition("the request is of epoch " + std::to_string(epoch.value) +
                            " and this connection has attached epoch " +
                            std::to_string(fenced.lease->epoch.value) +
                            "; use the epoch of the grant, or attach again");
}

Status DataService::Attach(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const wire::AttachRequest request, wire::DecodeAttachRequest(message));
  if (request.protocol_version != wire::kProtocolVersion) {
    return Unimplemented("attach: protocol version " + std::to_string(request.protocol_version) +
                         ", this server speaks " + std::to_string(wire::kProtocolVersion) +
                         "; use worker and server of one release");
  }
  const Lease* lease = shard_.FindTicket(request.ticket);
  if (lease == nullptr) {
    return Unauthenticated(
        "attach: the ticket is unknown or its lease has ended; open or create the context again");
  }
  if (connection.tenant && *connection.tenant != lease->tenant) {
    return PermissionDenied(
        "attach: the ticket is of another tenant than this connection; use a connection each");
  }
  if (connection.attached.size() >= limits::kAttachmentsPerConnectionMax &&
      !connection.attached.contains(lease->context)) {
    return ResourceExhausted("attach: this connection has " +
                             std::to_string(connection.attached.size()) +
                             " contexts, the maximum; use another connection");
  }
  connection.tenant = lease->tenant;
  connection.attached[lease->context] = lease->epoch;
  OutMessage reply;
  wire::Encode(wire::AttachReply{.shard = shard_.options().id,
                                 .shard_count = static_cast<uint16_t>(shard_.options().count),
                                 .extents = options_.extents,
                                 .pushes = options_.push != nullptr},
               &reply);
  Reply(connection, message, std::move(reply));
  return OkStatus();
}

}  // namespace icecache
