#include "cacheserver/tenant_work.h"

#include <optional>
#include <string>
#include <utility>

#include "common/limits.h"

namespace icecache {

TenantWork::Meter::Meter(TenantWork& work, TenantId tenant)
    : work_(work),
      tenant_(tenant),
      begin_(work.reactor_.clock().Now()),
      outermost_(!std::exchange(work.metering_, true)) {}

TenantWork::Meter::~Meter() {
  if (!outermost_) return;
  work_.metering_ = false;
  const Duration took = work_.reactor_.clock().Now() - begin_;
  work_.loads_[tenant_].service += took;
  work_.queue_.Charge(tenant_, took);
}

Status TenantWork::Submit(TenantId tenant, Task task) {
  TenantLoad& load = loads_[tenant];
  if (load.queued >= limits::kTenantRequestsQueuedMax ||
      task.bytes > limits::kTenantBytesQueuedMax - load.queued_bytes) {
    ++load.refused;
    return ResourceExhausted(
        std::to_string(load.queued) + " requests (" + std::to_string(load.queued_bytes) +
        " bytes) of this tenant wait on this shard, at most " +
        std::to_string(limits::kTenantRequestsQueuedMax) + " and " +
        std::to_string(limits::kTenantBytesQueuedMax) +
        "; wait for replies before sending more, or give the tenant more weight");
  }
  ++load.queued;
  load.queued_bytes += task.bytes;
  queue_.Push(tenant, std::move(task));
  ServeLater();
  return OkStatus();
}

void TenantWork::ServeLater() {
  if (std::exchange(posted_, true)) return;
  reactor_.Post([this, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) ServeSome();
  });
}

void TenantWork::ServeSome() {
  posted_ = false;
  const TimePoint end = reactor_.clock().Now() + limits::kServiceTurn;
  do {
    std::optional<FairQueue<Task>::Next> next = queue_.Pop();
    if (!next) return;
    TenantLoad& load = loads_[next->tenant];
    --load.queued;
    load.queued_bytes -= next->item.bytes;
    Status status;
    if (reactor_.clock().Now() >= next->item.deadline) {
      ++load.expired;
      status = DeadlineExceeded(
          "the request has waited for its turn until its deadline; this tenant's share of the "
          "server is used up (weight), or the server has too much to do");
    }
    const Meter meter(*this, next->tenant);
    next->item.run(status);
  } while (queue_.count() > 0 && reactor_.clock().Now() < end);
  if (queue_.count() > 0) ServeLater();
}

}  // namespace icecache
