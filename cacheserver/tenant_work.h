// TenantWork: what a shard's thread does for tenants, shared out by weight.
//
// Requests wait here in a FairQueue and are served one after the other, some in each turn of the
// loop, with what has arrived taken in between. What is done for a tenant outside its requests
// (indexing, installing an index) is metered and charged to it as well, so that a tenant pays for
// all its work.
//
//   Submit -> waits -> run(OK) | run(DEADLINE_EXCEEDED), when its time is over before its turn
//   comes
//
// Owned by the Shard; its thread. Bounds: limits::kTenantRequestsQueuedMax, kTenantBytesQueuedMax.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "cacheserver/fair_queue.h"
#include "common/clock.h"
#include "common/ids.h"
#include "common/reactor.h"
#include "common/status.h"

namespace icecache {

struct TenantLoad {
  uint64_t queued = 0;  // requests that wait
  uint64_t queued_bytes = 0;
  uint64_t refused = 0;  // because so many waited
  uint64_t expired = 0;  // before their turn came
  Duration service{0};   // time spent for the tenant
};

class TenantWork {
 public:
  explicit TenantWork(Reactor& reactor) : reactor_(reactor) {}
  TenantWork(const TenantWork&) = delete;
  TenantWork& operator=(const TenantWork&) = delete;

  void SetWeight(TenantId tenant, uint32_t weight) { queue_.SetWeight(tenant, weight); }

  struct Task {
    uint64_t bytes = 0;                      // that it holds while it waits
    TimePoint deadline = TimePoint::max();   // after it nobody wants the answer
    std::function<void(const Status&)> run;  // once, on a later turn
  };
  // RESOURCE_EXHAUSTED: too much of the tenant waits; the task is dropped.
  Status Submit(TenantId tenant, Task task);

  // Charges the tenant with the time until it goes. Inside another one it does nothing: that time
  // is charged already.
  class Meter {
   public:
    Meter(TenantWork& work, TenantId tenant);
    ~Meter();
    Meter(const Meter&) = delete;
    Meter& operator=(const Meter&) = delete;

   private:
    TenantWork& work_;
    const TenantId tenant_;
    const TimePoint begin_;
    const bool outermost_;
  };

  const std::map<TenantId, TenantLoad>& loads() const { return loads_; }

 private:
  void ServeLater();
  void ServeSome();

  Reactor& reactor_;
  FairQueue<Task> queue_;
  std::map<TenantId, TenantLoad> loads_;
  bool posted_ = false;
  bool metering_ = false;
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
