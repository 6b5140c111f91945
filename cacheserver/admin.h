// Admin: the HTTP pages for people and monitors. GET only, nothing here changes the server.
//
//   /metrics   Prometheus text        /live     200 while the process turns
//   /status    JSON                   /ready    200 while it takes new contexts, 503 while it
//   drains /version   JSON                   /config   the merged settings, TOML
//
// On loopback open to all; elsewhere every page but /live and /ready asks for "Authorization:
// Bearer TENANT:SECRET" of a tenant with the admin right. Bounds: kHttpConnectionsMax connections,
// kHttpRequestBytesMax a request, kHttpTimeout each. Boost.Beast stays behind admin.cc. Thread:
// control.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "common/metrics.h"
#include "common/reactor.h"
#include "common/status.h"

namespace icecache {

// What the pages show. A page that must ask the shards answers through the function it is given,
// once, later.
struct AdminPages {
  using Answer = std::function<void(std::string)>;
  std::function<bool()> ready;
  std::function<void(Answer)> metrics;
  std::function<void(Answer)> status;
  std::string version;
  std::string config;
  // Whether "TENANT:SECRET" may see the pages; empty: everybody may.
  std::function<bool(std::string_view)> authorize;
};

class Admin {
 public:
  Admin(Reactor& reactor, MetricsRegistry& metrics, AdminPages pages);
  ~Admin();  // closes all connections
  Admin(const Admin&) = delete;
  Admin& operator=(const Admin&) = delete;

  // The address with the port chosen. UNAVAILABLE: the port is taken.
  Result<std::string> Listen(const std::string& host, uint16_t port);

 private:
  struct Impl;
  class Session;
  std::shared_ptr<Impl> impl_;
};

}  // namespace icecache
