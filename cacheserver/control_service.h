// ControlService: the sockets of the control plane. Frames in, ContextService, frames out.
//
// A connection says Hello first (tenant, secret) and gets the data-plane addresses. After that it
// may have kControlRequestsInFlightMax requests open; replies carry the request's id and may
// overtake each other. A frame that is too long or does not decode ends its connection, and only
// that. A connection that closes ends its leases at once; one that is silent for the lease time
// (half-open) is closed then. Thread: control.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cacheserver/context_service.h"
#include "common/control_stream.h"
#include "common/reactor.h"

namespace icecache {

struct ControlServiceOptions {
  std::vector<std::string> shards;  // data-plane addresses, in the order of the shards
  Duration lease_time = limits::kLeaseTime;
  uint32_t heartbeat_ms = static_cast<uint32_t>(limits::kHeartbeatInterval.count());
  std::shared_ptr<TlsContext> tls;  // nullptr: in the clear
};

class ControlService {
 public:
  ControlService(Reactor& reactor, ContextService& contexts, const TenantTable& tenants,
                 MetricsRegistry& metrics, ControlServiceOptions options);
  ~ControlService();  // closes all connections
  ControlService(const ControlService&) = delete;
  ControlService& operator=(const ControlService&) = delete;

  // Accepts connections; answers with the address, port 0 replaced by the one chosen. UNAVAILABLE:
  // the port is taken.
  Result<std::string> Listen(const std::string& host, uint16_t port);
  void StopAccepting();
  // For connections from now on; those that stand keep theirs.
  void SetTls(std::shared_ptr<TlsContext> tls);
  // After a reload of the token file: ends the connections of tenants that are gone.
  void CloseInactiveTenants();
  size_t connection_count() const;
  // Address and program of a connection; empty when it is gone.
  std::string PeerOf(ConnectionId connection) const;
  uint64_t requests_open() const;  // taken and not yet answered

 private:
  struct Impl;
  class Connection;
  std::shared_ptr<Impl> impl_;
};

}  // namespace icecache
