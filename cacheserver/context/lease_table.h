// LeaseTable: who may use which context until when.
//
// A lease is a time-bounded right of one control connection to use one context. It has its own
// epoch: every data request names it, and a request with the epoch of a lease that has ended is
// refused, however late it arrives (fencing). The ticket is what a worker shows on its data
// connections: 32 unguessable bytes bound to tenant, context and epoch, void when the lease ends.
//
// Lifecycle: 1. Grant -> 2. Renew* -> 3. End | EndConnection | EndContext | EndExpired. All four
// hand the lease out, and the caller tells the shards. A lease past its time is dead for Find and
// Renew even before EndExpired has swept it. Thread: control. Costs: EndConnection, EndContext,
// CountOf and EndExpired walk all leases (kLeasesMax); Find is a hash look-up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "common/clock.h"
#include "common/ids.h"
#include "common/status.h"

namespace icecache {

using ConnectionId =
    StrongInt<struct ConnectionTag, uint64_t>;  // of a control connection; never reused

inline constexpr size_t kTicketBytes = 32;

struct Lease {
  Epoch epoch;
  ContextId context;
  TenantId tenant;
  ConnectionId connection;
  bool writable = false;  // of the connection that created or forked the context
  TimePoint expires;
  std::vector<std::byte> ticket;
};

class LeaseTable {
 public:
  // first_epoch: larger than any epoch that an earlier run of the server has given out.
  LeaseTable(const Clock& clock, Duration lease_time, Epoch first_epoch);

  // RESOURCE_EXHAUSTED above kLeasesMax; UNAVAILABLE when the kernel gives no random bytes.
  Result<Lease> Grant(ContextId context, TenantId tenant, ConnectionId connection, bool writable);

  // Extends every living lease of the connection by the lease time from now; how many there were.
  uint32_t Renew(ConnectionId connection);

  // The living lease of this connection on this context; the writable one if there are two.
  std::optional<Lease> Find(ConnectionId connection, ContextId context) const;
  bool Alive(Epoch epoch) const;
  std::vector<Lease> List() const;  // living ones, by epoch

  std::optional<Lease> End(Epoch epoch);
  std::vector<Lease> EndConnection(ConnectionId connection);
  std::vector<Lease> EndContext(ContextId context);
  std::vector<Lease> EndExpired();

  uint32_t CountOf(ContextId context) const;  // expired and not swept ones included
  uint32_t count() const { return static_cast<uint32_t>(leases_.size()); }
  Duration lease_time() const { return lease_time_; }
  const Clock& clock() const { return clock_; }

 private:
  template <typename Predicate>
  std::vector<Lease> EndWhere(Predicate predicate);

  const Clock& clock_;
  const Duration lease_time_;
  Epoch next_epoch_;
  std::unordered_map<Epoch, Lease> leases_;
};

}  // namespace icecache
