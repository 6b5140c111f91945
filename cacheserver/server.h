// Server: icecache-server without its command line. Wires the threads together and takes them apart
// again.
//
//   Start    shards come up (thread, reactor, transport, pool), then the control plane, then the
//   admin pages Run      the control loop, on the caller's thread, until Drain has finished or Stop
//   Drain    not ready, no new contexts or connections; ends when no lease is left or the time is
//   up ~Server  closes in the reverse order: connections, running builds, shards
//
// Start on any thread; Run and destruction on one; Drain, Reload and Stop on any.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cacheserver/context/tenant.h"
#include "cacheserver/page_push.h"
#include "cacheserver/server_config.h"
#include "common/clock.h"
#include "common/control_stream.h"
#include "common/metrics.h"
#include "common/reactor.h"
#include "common/status.h"
#include "common/transport.h"

namespace icecache {

class ColdPool;
class ContextStore;
struct ContextManifest;

struct ServerParts {
  ServerConfig config;
  std::string merged_config;  // for /config
  TenantTable tenants = TenantTable::Open();
  std::shared_ptr<TlsContext> tls;  // of the control plane; nullptr: in the clear
  // Makes the transport of one shard, on its thread.
  std::function<Result<std::unique_ptr<Transport>>(Reactor&)> make_transport;
  Duration spin = Duration::zero();  // of every shard's reactor
};

class Server {
 public:
  // INVALID_ARGUMENT, UNAVAILABLE (a port is taken), or what a transport says; nothing is left
  // running then.
  static Result<std::unique_ptr<Server>> Start(ServerParts parts);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // OK after a drain or Stop; a drain that ran out of time is OK too, and logged.
  Status Run();
  void Drain();
  void Stop();
  // Takes over files that were read again. tls: for connections from now on; REQUIRES: the server
  // was started with TLS.
  void Reload(TenantTable tenants);
  void Reload(std::shared_ptr<TlsContext> tls);

  // Addresses as they were chosen.
  const std::string& control_address() const { return control_address_; }
  const std::string& http_address() const { return http_address_; }
  std::vector<std::string> data_addresses() const;
  std::string transport_description() const;
  Reactor& reactor() { return *reactor_; }

 private:
  struct ShardThread;
  struct ControlPlane;

  explicit Server(ServerParts parts);
  Status OpenColdStore();
  Status StartShards();
  Status StartControl();
  void OfferRecovered(const std::vector<ContextManifest>& contexts, uint64_t orphans);
  void ContinueDrain(TimePoint deadline);
  void MeasureLag(Reactor& reactor, const std::string& loop);
  void RenderStatus(std::function<void(std::string)> answer);
  void RenderMetrics(std::function<void(std::string)> answer);

  ServerParts parts_;
  MakePushDevice push_device_;  // empty: nothing is pushed
  const std::unique_ptr<Clock> clock_;
  MetricsRegistry metrics_;
  std::unique_ptr<Reactor> reactor_;  // control
  std::vector<std::unique_ptr<ShardThread>> shards_;
  std::unique_ptr<class BuildPool> builds_;
  std::unique_ptr<ColdPool> cold_;            // nullptr: nothing is kept on disk
  std::unique_ptr<ContextStore> context_store_;  // with cold_
  std::unique_ptr<ControlPlane> control_;
  std::string control_address_;
  std::string http_address_;
  std::atomic<bool> ready_{false};
  TimePoint started_;
};

}  // namespace icecache
