#include "cacheserver/extent_service.h"

#include <fcntl.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/extent_socket.h"
#include "common/limits.h"
#include "common/log.h"

#ifndef F_SEAL_FUTURE_WRITE  // Linux 5.1; older headers lack the name
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace icecache {

namespace {

using Descriptor = boost::asio::posix::stream_descriptor;

// A descriptor of the same memory that is open for reading only. Without the seal its receiver
// could open it for writing again: then it is not lent.
OwnedFd ReadOnly(int fd) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_FUTURE_WRITE) == 0) return OwnedFd();
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  return OwnedFd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
}

}  // namespace

struct ExtentService::Impl : std::enable_shared_from_this<Impl> {
  Impl(Shard& s, Reactor& r, MetricsRegistry& metrics)
      : shard(s),
        reactor(r),
        lent(metrics.GetCounter("icecache_extents_lent_total",
                                "Extents handed to workers on this host for reading.")),
        listener(r.io()) {}

  void WaitForConnection() {
    listener.async_wait(Descriptor::wait_read, [weak = weak_from_this()](auto error) {
      const auto self = weak.lock();
      if (!self || error) return;
      while (true) {
        OwnedFd fd = AcceptExtents(self->listener.native_handle());
        if (!fd.valid()) break;
        if (self->connections.size() >= limits::kExtentSocketConnectionsMax) continue;  // closes it
        const uint64_t id = self->next++;
        self->connections.emplace(id, Descriptor(self->reactor.io(), fd.Release()));
        self->WaitForRequest(id);
      }
      self->WaitForConnection();
    });
  }

  void WaitForRequest(uint64_t id) {
    connections.at(id).async_wait(Descriptor::wait_read, [weak = weak_from_this(), id](auto error) {
      const auto self = weak.lock();
      if (!self || error) return;
      const auto it = self->connections.find(id);
      if (it == self->connections.end()) return;
      if (self->Answer(it->second.native_handle()).ok()) {
        self->WaitForRequest(id);
      } else {
        self->connections.erase(it);
      }
    });
  }

  Status Answer(int fd) {
    KV_ASSIGN_OR_RETURN(const ExtentRequest request, ReceiveExtentRequest(fd));
    const Lease* lease = shard.FindTicket(request.ticket);
    if (lease == nullptr) return SendExtents(fd, StatusCode::kUnauthenticated, {}, {});
    std::vector<uint64_t> serials;
    std::vector<OwnedFd> opened;
    std::vector<int> fds;
    for (const PagePool::ExtentInfo& extent : shard.pool().ExtentsOf(lease->tenant)) {
      const bool wanted =
          request.serials.empty() || std::find(request.serials.begin(), request.serials.end(),
                                               extent.serial) != request.serials.end();
      if (!wanted || serials.size() >= limits::kExtentsPerReplyMax) continue;
      opened.push_back(ReadOnly(extent.fd));
      if (!opened.back().valid()) return SendExtents(fd, StatusCode::kUnimplemented, {}, {});
      serials.push_back(extent.serial);
      fds.push_back(opened.back().get());
    }
    lent.Add(fds.size());
    return SendExtents(fd, StatusCode::kOk, serials, fds);
  }

  Shard& shard;
  Reactor& reactor;
  Counter& lent;
  Descriptor listener;
  std::unordered_map<uint64_t, Descriptor> connections;
  uint64_t next = 1;
};

ExtentService::ExtentService(Shard& shard, Reactor& reactor, MetricsRegistry& metrics)
    : impl_(std::make_shared<Impl>(shard, reactor, metrics)) {}

ExtentService::~ExtentService() {
  boost::system::error_code ignored;
  impl_->listener.close(ignored);
  impl_->connections.clear();
}

std::string ExtentService::Listen() {
  const std::string name = FreshExtentSocketName();
  Result<OwnedFd> fd = ListenExtents(name);
  if (!fd.ok()) {
    LogWarn("workers on this host will be sent pages instead of reading them in place",
            {{"shard", std::to_string(impl_->shard.options().id.value)},
             {"reason", fd.status().ToString()}});
    return {};
  }
  impl_->listener.assign(fd->Release());
  impl_->WaitForConnection();
  return name;
}

size_t ExtentService::connection_count() const { return impl_->connections.size(); }

}  // namespace icecache
