// ServerLink: everything that a worker needs to talk to one cache server, made in the right order
// and taken down in the reverse: clock, reactor, transport, control connection, data connections.
//
// Thread: the decode thread, which turns the reactor while it waits and, through Pump(), between
// pieces of computation (heartbeats and lease renewals go out only then).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "common/clock.h"
#include "common/control_client.h"
#include "common/reactor.h"
#include "common/transport.h"
#include "worker/cache_client.h"

namespace icecache {

class PageSharing;

struct ServerLinkOptions {
  ControlClientOptions control;
  CacheClientOptions cache;
  UcxOptions ucx;
  PageSharing* sharing = nullptr;  // borrowed; what is shared through this server
};

class ServerLink {
 public:
  // Connects and says hello. Errors name the address, what failed and the remedy.
  static Result<std::unique_ptr<ServerLink>> Connect(const ServerLinkOptions& options);
  ~ServerLink();
  ServerLink(const ServerLink&) = delete;
  ServerLink& operator=(const ServerLink&) = delete;

  ControlClient& control() { return *control_; }
  CacheClient& cache() { return *cache_; }
  Reactor& reactor() { return *reactor_; }

  // One turn of the loop. CANCELLED when interrupted, UNAVAILABLE when a connection is lost.
  Status Pump();

 private:
  ServerLink() = default;
  // Tells the server what this worker shares, takes what others do, and does so again later.
  void ShareFrames();

  std::unique_ptr<Clock> clock_;
  std::unique_ptr<Reactor> reactor_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<ControlClient> control_;
  std::unique_ptr<CacheClient> cache_;
  std::function<bool()> interrupted_;
  PageSharing* sharing_ = nullptr;
  bool sharing_known_ = false;  // the server has answered
  Reactor::TimerId sharing_timer_ = 0;
};

}  // namespace icecache
