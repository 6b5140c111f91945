// FairQueue: things to do, in one queue per tenant; tenants take turns by weight.
//
// Start-time fair queueing (Goyal et al., SIGCOMM 1996) over the time that work has taken, since
// nobody knows beforehand what a request costs. A tenant's tag is the time it has been served,
// divided by its weight; next is the oldest item of the waiting tenant with the least tag. One that
// begins to wait starts no lower than the tag served last: idling saves nothing up.
//
//   - Two tenants that both wait are served in proportion to their weights, but for one item each.
//   - A newcomer waits for one item of each other tenant at most, however long their queues are.
//   - Within a tenant items leave in the order they came in.
//   - Nobody waits while nobody is served.
//
// Bounds of queues are the owner's business. No clock, no lock, no thread of its own.
// Cost: O(log tenants) a call. Bad at: many servers of one queue, which each may take an item of
// the same tenant before the first is charged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "common/clock.h"
#include "common/ids.h"
#include "common/limits.h"
#include "common/status.h"

namespace icecache {

template <typename Item>
class FairQueue {
 public:
  struct Next {
    TenantId tenant;
    Item item;
  };

  // From now on; 1 unless set. REQUIRES: 1 to limits::kTenantWeightMax.
  void SetWeight(TenantId tenant, uint32_t weight) {
    KV_CHECK(weight >= 1 && weight <= limits::kTenantWeightMax);
    tenants_[tenant].weight = weight;
  }

  void Push(TenantId tenant, Item item) {
    Tenant& t = tenants_[tenant];
    if (t.items.empty()) {
      t.tag = std::max(t.tag, served_tag_);
      t.turn = ++turns_;
      waiting_.emplace(t.tag, t.turn, tenant);
    }
    t.items.push_back(std::move(item));
    ++count_;
  }

  // The caller does it and then says with Charge what it took.
  std::optional<Next> Pop() {
    if (waiting_.empty()) return std::nullopt;
    const TenantId tenant = std::get<2>(*waiting_.begin());
    waiting_.erase(waiting_.begin());
    Tenant& t = tenants_[tenant];
    served_tag_ = std::max(served_tag_, t.tag);
    Next next{tenant, std::move(t.items.front())};
    t.items.pop_front();
    --count_;
    // Behind those of the same tag, so that work that takes no time goes round, too.
    t.turn = ++turns_;
    if (!t.items.empty()) waiting_.emplace(t.tag, t.turn, tenant);
    return next;
  }

  // Time spent for a tenant, on an item or otherwise.
  void Charge(TenantId tenant, Duration service) {
    if (service <= Duration(0)) return;
    Tenant& t = tenants_[tenant];
    const bool waits = !t.items.empty();
    if (waits) waiting_.erase({t.tag, t.turn, tenant});
    t.tag += static_cast<uint64_t>(service.count()) * limits::kTenantWeightMax / t.weight;
    if (waits) waiting_.emplace(t.tag, t.turn, tenant);
  }

  size_t count() const { return count_; }

 private:
  struct Tenant {
    std::deque<Item> items;
    uint32_t weight = 1;
    uint64_t tag = 0;   // nanoseconds x kTenantWeightMax / weight: 5 years of service
    uint64_t turn = 0;  // of the last Pop, or of the Push that made it wait
  };

  std::unordered_map<TenantId, Tenant> tenants_;  // all that ever were: at most kTenantsMax
  std::set<std::tuple<uint64_t, uint64_t, TenantId>> waiting_;  // tag, turn; those with items
  uint64_t served_tag_ = 0;                                     // of the last Pop
  uint64_t turns_ = 0;
  size_t count_ = 0;
};

}  // namespace icecache
