#include "cacheserver/server.h"

#include <algorithm>
#include <future>
#include <thread>
#include <utility>

#include "cacheserver/admin.h"
#include "cacheserver/build_pool.h"
#include "cacheserver/context_service.h"
#include "cacheserver/context_store.h"
#include "cacheserver/control_service.h"
#include "cacheserver/data_service.h"
#include "cacheserver/extent_keys.h"
#include "cacheserver/extent_service.h"
#include "cacheserver/listen.h"
#include "cacheserver/page_push.h"
#include "cacheserver/server_report.h"
#include "cacheserver/shard_group.h"
#include "common/address.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

constexpr Duration kDrainCheckInterval = std::chrono::milliseconds(20);

// Ids and epochs start here: larger than any of an earlier run on this machine, so that neither a late
// request nor a page that a worker kept passes for one of this run.
uint64_t MicrosSince1970() {
  const auto since = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(since).count());
}

double Seconds(Duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

// Everything that lives on one shard's thread. Made and destroyed there, except the reactor, which
// others post to.
struct Server::ShardThread {
  ShardThread(const Clock& clock, Duration spin) : reactor(clock, spin) {}

  Status Open(Server& server, ShardId id) {
    KV_ASSIGN_OR_RETURN(transport, server.parts_.make_transport(reactor));
    const ServerConfig& config = server.parts_.config;
    shard = std::make_unique<Shard>(
        ShardOptions{
            .id = id, .count = config.threads, .memory_bytes = config.memory_size / config.threads},
        reactor, *server.builds_, server.metrics_, server.cold_.get());
    extents = std::make_unique<ExtentService>(*shard, reactor, server.metrics_);
    keys = std::make_unique<ExtentKeys>(shard->pool(), *transport, server.metrics_);
    if (server.push_device_) {
      push =
          std::make_unique<PagePush>(shard->pool(), reactor, server.metrics_, server.push_device_);
    }
    service = std::make_unique<DataService>(
        *shard, reactor, server.metrics_,
        DataServiceOptions{.peer_timeout = std::chrono::milliseconds(config.lease_ms),
                           .heartbeat_interval = std::chrono::milliseconds(config.heartbeat_ms),
                           .extents = extents->Listen(),
                           .keys = keys.get(),
                           .push = push.get()});
    KV_ASSIGN_OR_RETURN(address, transport->Listen(FormatHostPort({config.host, 0}),
                                                   [this](std::unique_ptr<Endpoint> endpoint) {
                                                     service->Accept(std::move(endpoint));
                                                   }));
    description = transport->Describe();
    server.MeasureLag(reactor, "shard" + std::to_string(id.value));
    return OkStatus();
  }

  void Main(Server& server, ShardId id, std::promise<Status> opened) {
    Status status = Open(server, id);
    const bool ok = status.ok();
    opened.set_value(std::move(status));
    if (ok) reactor.Run();
    // Connections before the transport they speak over, both before the memory that their replies
    // point into.
    service.reset();
    push.reset();
    extents.reset();
    keys.reset();
    transport.reset();
    shard.reset();
  }

  Reactor reactor;
  std::unique_ptr<Transport> transport;
  std::unique_ptr<Shard> shard;
  std::unique_ptr<ExtentService> extents;
  std::unique_ptr<ExtentKeys> keys;
  std::unique_ptr<PagePush> push;  // null: nothing is pushed
  std::unique_ptr<DataService> service;
  std::string address;
  std::string description;
  std::thread thread;
};

struct Server::ControlPlane {
  ControlPlane(Server& server, std::vector<ShardGroup::Member> members,
               ControlServiceOptions options, uint64_t first_id)
      : shards(*server.reactor_, std::move(members)),
        leases(*server.clock_, options.lease_time, Epoch(first_id)),
        contexts(shards, server.parts_.tenants, leases, server.metrics_,
                 server.context_store_.get(), first_id),
        service(*server.reactor_, contexts, server.parts_.tenants, server.metrics_,
                std::move(options)) {
    contexts.SetMergeTokens(server.parts_.config.merge_tokens);
  }

  ShardGroup shards;
  LeaseTable leases;
  ContextService contexts;
  ControlService service;
  std::unique_ptr<Admin> admin;
};

Server::Server(ServerParts parts)
    : parts_(std::move(parts)),
      clock_(MakeSteadyClock()),
      reactor_(std::make_unique<Reactor>(*clock_, Duration::zero())),
      builds_(std::make_unique<BuildPool>(parts_.config.build_threads)),
      started_(clock_->Now()) {}

Server::~Server() {
  ready_ = false;
  control_.reset();
  builds_->Stop();
  if (cold_ != nullptr) cold_->Stop();
  for (const auto& shard : shards_) shard->reactor.Stop();
  for (const auto& shard : shards_) {
    if (shard->thread.joinable()) shard->thread.join();
  }
}

Result<std::unique_ptr<Server>> Server::Start(ServerParts parts) {
  std::unique_ptr<Server> server(new Server(std::move(parts)));
  KV_RETURN_IF_ERROR(server->OpenColdStore());
  KV_RETURN_IF_ERROR(server->StartShards());
  KV_RETURN_IF_ERROR(server->StartControl());
  server->ready_ = true;
  return server;
}

Status Server::OpenColdStore() {
  const ServerConfig& config = parts_.config;
  if (config.data_dir.empty()) return OkStatus();
  ColdStoreOptions options;
  options.directory = config.data_dir;
  options.write_bytes_per_second = config.cold_write_rate;
  options.direct_io = config.cold_direct_io;
  KV_ASSIGN_OR_RETURN(std::unique_ptr<ColdStore> store, OpenRocksColdStore(options));
  cold_ = std::make_unique<ColdPool>(std::move(store), config.cold_threads, *clock_, metrics_);
  context_store_ = std::make_unique<ContextStore>(*reactor_, *cold_);
  return OkStatus();
}

Status Server::StartShards() {
  // Shards and control plane on the same address, whatever the name resolves to later.
  KV_ASSIGN_OR_RETURN(parts_.config.host, ResolveHost(parts_.config.host));
  Result<MakePushDevice> push = ChoosePushDevice(parts_.config.push_pages);
  if (push.ok()) {
    push_device_ = *std::move(push);
  } else {
    LogInfo("no pages are pushed to GPUs", {{"reason", push.status().message()}});
  }
  std::vector<std::future<Status>> opened;
  for (uint32_t i = 0; i < parts_.config.threads; ++i) {
    shards_.push_back(std::make_unique<ShardThread>(*clock_, parts_.spin));
    ShardThread* shard = shards_.back().get();
    std::promise<Status> promise;
    opened.push_back(promise.get_future());
    shard->thread = std::thread([this, shard, i, promise = std::move(promise)]() mutable {
      shard->Main(*this, ShardId(static_cast<uint16_t>(i)), std::move(promise));
    });
  }
  Status status;
  for (size_t i = 0; i < opened.size(); ++i) {
    Status of_shard = opened[i].get();
    if (status.ok() && !of_shard.ok()) status = of_shard.WithContext("shard " + std::to_string(i));
  }
  return status;
}

Status Server::StartControl() {
  const ServerConfig& config = parts_.config;
  ControlServiceOptions options;
  options.shards = data_addresses();
  options.lease_time = std::chrono::milliseconds(config.lease_ms);
  options.heartbeat_ms = config.heartbeat_ms;
  options.tls = parts_.tls;
  std::vector<ShardGroup::Member> members;
  for (const auto& shard : shards_) members.push_back({&shard->reactor, shard->shard.get()});
  ContextStore::Recovered recovered;
  recovered.first_id = MicrosSince1970();
  if (context_store_ != nullptr) {
    Result<ContextStore::Recovered> found = context_store_->Recover(recovered.first_id);
    if (!found.ok()) return found.status().WithContext("--data-dir " + config.data_dir);
    recovered = std::move(found).value();
  }
  control_ = std::make_unique<ControlPlane>(*this, std::move(members), std::move(options),
                                            recovered.first_id);
  OfferRecovered(recovered.contexts, recovered.orphans);
  control_->contexts.ApplyQuotas();
  control_->contexts.SetHooks(
      {.drain = [this] { Drain(); },
       .peer = [this](ConnectionId id) { return control_->service.PeerOf(id); }});
  MeasureLag(*reactor_, "control");

  AdminPages pages;
  pages.ready = [this] { return ready_.load(); };
  pages.metrics = [this](AdminPages::Answer answer) { RenderMetrics(std::move(answer)); };
  pages.status = [this](AdminPages::Answer answer) { RenderStatus(std::move(answer)); };
  pages.version = std::string("{\"program\": \"icecache-server\", \"version\": \"") +
                  kServerVersion + "\", \"protocol\": " + std::to_string(wire::kProtocolVersion) +
                  "}\n";
  pages.config = parts_.merged_config;
  if (!IsLoopbackHost(config.http_host)) {
    pages.authorize = [this](std::string_view bearer) {
      const size_t colon = bearer.find(':');
      if (colon == std::string_view::npos) return false;
      Result<TenantId> tenant =
          parts_.tenants.Authenticate(bearer.substr(0, colon), bearer.substr(colon + 1));
      return tenant.ok() && parts_.tenants.Get(*tenant).rights.admin;
    };
  }
  control_->admin = std::make_unique<Admin>(*reactor_, metrics_, std::move(pages));
  KV_ASSIGN_OR_RETURN(
      http_address_,
      control_->admin->Listen(config.http_host, static_cast<uint16_t>(config.http_port)));
  KV_ASSIGN_OR_RETURN(control_address_,
                      control_->service.Listen(config.host, static_cast<uint16_t>(config.port)));
  return OkStatus();
}

void Server::OfferRecovered(const std::vector<ContextManifest>& contexts, uint64_t orphans) {
  uint64_t offered = 0;
  for (const ContextManifest& manifest : contexts) {
    const Status status = control_->contexts.Recover(manifest);
    offered += status.ok();
    if (status.ok()) continue;
    LogWarn("durable context not offered", {{"tenant", manifest.tenant},
                                            {"context", manifest.name},
                                            {"reason", status.ToString()}});
  }
  if (context_store_ == nullptr) return;
  LogInfo("cold store open", {{"folder", parts_.config.data_dir},
                              {"contexts", std::to_string(offered)},
                              {"segments_discarded", std::to_string(orphans)}});
}

Status Server::Run() {
  reactor_->Run();
  return OkStatus();
}

void Server::Stop() { reactor_->Stop(); }

void Server::Drain() {
  reactor_->Post([this] {
    if (!ready_.exchange(false)) return;  // draining already
    LogInfo("draining", {{"leases", std::to_string(control_->contexts.lease_count())},
                         {"timeout_ms", std::to_string(parts_.config.drain_timeout_ms)}});
    control_->contexts.StopAdmitting();
    control_->service.StopAccepting();
    for (const auto& shard : shards_) {
      shard->reactor.Post([s = shard.get()] { s->service->StopAccepting(); });
    }
    ContinueDrain(clock_->Now() + std::chrono::milliseconds(parts_.config.drain_timeout_ms));
  });
}

void Server::ContinueDrain(TimePoint deadline) {
  // Data requests need a lease: without one nothing can be in flight on the data plane either.
  const uint32_t leases = control_->contexts.lease_count();
  const uint64_t requests = control_->service.requests_open();
  const bool late = clock_->Now() >= deadline;
  if (late) {
    LogWarn("drain timed out",
            {{"leases", std::to_string(leases)}, {"requests", std::to_string(requests)}});
  }
  if (late || (leases == 0 && requests == 0)) return reactor_->Stop();
  reactor_->After(kDrainCheckInterval, [this, deadline] { ContinueDrain(deadline); });
}

void Server::Reload(TenantTable tenants) {
  reactor_->Post([this, tenants = std::move(tenants)] {
    parts_.tenants.Update(tenants);
    control_->service.CloseInactiveTenants();
    control_->contexts.ApplyQuotas();
    LogInfo("token file reloaded", {{"tenants", std::to_string(tenants.all().size())}});
  });
}

void Server::Reload(std::shared_ptr<TlsContext> tls) {
  reactor_->Post([this, tls = std::move(tls)] {
    control_->service.SetTls(tls);
    LogInfo("certificate reloaded");
  });
}

std::vector<std::string> Server::data_addresses() const {
  std::vector<std::string> addresses;
  for (const auto& shard : shards_) addresses.push_back(shard->address);
  return addresses;
}

std::string Server::transport_description() const {
  return shards_.empty() ? std::string() : shards_.front()->description;
}

// A timer that is late by t means that a handler has held the loop for about t.
void Server::MeasureLag(Reactor& reactor, const std::string& loop) {
  Histogram& lag = metrics_.GetHistogram(
      "icecache_loop_lag_seconds", "How late timers run: how long handlers hold an event loop.",
      {{"loop", loop}});
  auto tick = std::make_shared<std::function<void()>>();
  std::weak_ptr<std::function<void()>> weak = tick;
  auto due = std::make_shared<TimePoint>();
  auto arm = [&reactor, due](std::function<void()> fn) {
    *due = reactor.clock().Now() + limits::kLoopLagInterval;
    reactor.After(limits::kLoopLagInterval, std::move(fn));
  };
  *tick = [&reactor, &lag, due, arm, weak] {
    lag.ObserveSeconds(std::max(0.0, Seconds(reactor.clock().Now() - *due)));
    if (auto self = weak.lock()) arm([self] { (*self)(); });
  };
  arm([tick] { (*tick)(); });
}

void Server::RenderStatus(std::function<void(std::string)> answer) {
  control_->shards.Gather<ShardStatus>(
      [](Shard& shard) { return shard.status(); },
      [this, answer = std::move(answer)](std::vector<ShardStatus> shards) {
        for (size_t i = 0; i < shards.size(); ++i) {
          shards[i].address = shards_[i]->address;
          shards[i].transport = shards_[i]->description;
          shards[i].connections = static_cast<uint64_t>(
              metrics_.GetGauge("icecache_data_connections", "", {{"shard", std::to_string(i)}})
                  .value());
        }
        ServerReport report;
        report.ready = ready_;
        report.uptime_seconds = Seconds(clock_->Now() - started_);
        report.memory_size = parts_.config.memory_size;
        report.control_connections = control_->service.connection_count();
        report.leases = control_->contexts.lease_count();
        report.control_address = control_address_;
        report.shards = std::move(shards);
        control_->contexts.Report(
            [this, report = std::move(report), answer](ContextReport contexts) mutable {
              report.contexts = std::move(contexts);
              answer(StatusJson(report, parts_.tenants));
            });
      });
}

void Server::RenderMetrics(std::function<void(std::string)> answer) {
  control_->shards.Gather<ShardStatus>(
      [](Shard& shard) { return shard.status(); },
      [this, answer = std::move(answer)](const std::vector<ShardStatus>& shards) {
        SetMemoryGauges(shards, parts_.tenants, parts_.config.memory_size, metrics_);
        if (cold_ != nullptr) SetStoreMetrics(cold_->store(), metrics_);
        answer(metrics_.RenderPrometheus());
      });
}

}  // namespace icecache
