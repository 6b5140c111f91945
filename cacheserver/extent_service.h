// ExtentService: lends the extents of a tenant to its workers on the same host, so that they read
// pages in place instead of being sent them (reply mode "mapped", docs/protocol.md).
//
// One socket per shard with a name that only workers that have attached are told. Every request
// shows a ticket of a living lease and gets extents of that lease's tenant, read-only. What has
// been lent stays mapped until the worker lets go of it: an extent never passes to another tenant,
// so a worker whose lease has ended reads nobody else's rows. Thread: the shard's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cacheserver/shard.h"
#include "common/metrics.h"
#include "common/reactor.h"

namespace icecache {

class ExtentService {
 public:
  ExtentService(Shard& shard, Reactor& reactor, MetricsRegistry& metrics);
  ~ExtentService();  // closes all connections
  ExtentService(const ExtentService&) = delete;
  ExtentService& operator=(const ExtentService&) = delete;

  // Starts and returns the socket's name. Empty, and one line in the log, where that cannot be had:
  // pages then travel in messages.
  std::string Listen();

  size_t connection_count() const;

 private:
  struct Impl;
  const std::shared_ptr<Impl> impl_;  // shared with handlers that wait
};

}  // namespace icecache
