#include "cacheserver/context/lease_table.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "common/limits.h"

namespace icecache {
namespace {

Result<std::vector<std::byte>> MakeTicket() {
  std::vector<std::byte> ticket(kTicketBytes);
  size_t have = 0;
  while (have < ticket.size()) {
    ssize_t n = getrandom(ticket.data() + have, ticket.size() - have, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      return Unavailable(std::string("ticket: getrandom failed: ") + std::strerror(errno));
    have += static_cast<size_t>(n);
  }
  return ticket;
}

}  // namespace

LeaseTable::LeaseTable(const Clock& clock, Duration lease_time, Epoch first_epoch)
    : clock_(clock), lease_time_(lease_time), next_epoch_(first_epoch) {
  KV_CHECK(lease_time > Duration::zero());
  KV_CHECK(first_epoch.value > 0);
}

Result<Lease> LeaseTable::Grant(ContextId context, TenantId tenant, ConnectionId connection,
                                bool writable) {
  if (leases_.size() >= limits::kLeasesMax) {
    return ResourceExhausted("lease: the server holds " + std::to_string(leases_.size()) +
                             " leases, its maximum; release contexts that are no longer used");
  }
  KV_ASSIGN_OR_RETURN(std::vector<std::byte> ticket, MakeTicket());
  Lease lease{.epoch = next_epoch_,
              .context = context,
              .tenant = tenant,
              .connection = connection,
              .writable = writable,
              .expires = clock_.Now() + lease_time_,
              .ticket = std::move(ticket)};
  ++next_epoch_.value;
  bool inserted = leases_.emplace(lease.epoch, lease).second;
  KV_CHECK(inserted);
  return lease;
}

uint32_t LeaseTable::Renew(ConnectionId connection) {
  const TimePoint now = clock_.Now();
  uint32_t renewed = 0;
  for (auto& [epoch, lease] : leases_) {
    // A lease past its time stays dead: the shards may have been told already.
    if (lease.connection != connection || lease.expires <= now) continue;
    lease.expires = now + lease_time_;
    ++renewed;
  }
  return renewed;
}

std::optional<Lease> LeaseTable::Find(ConnectionId connection, ContextId context) const {
  const TimePoint now = clock_.Now();
  const Lease* found = nullptr;
  for (const auto& [epoch, lease] : leases_) {
    if (lease.connection != connection || lease.context != context || lease.expires <= now)
      continue;
    if (found == nullptr || lease.writable) found = &lease;
  }
  if (found == nullptr) return std::nullopt;
  return *found;
}

bool LeaseTable::Alive(Epoch epoch) const {
  auto it = leases_.find(epoch);
  return it != leases_.end() && it->second.expires > clock_.Now();
}

std::vector<Lease> LeaseTable::List() const {
  const TimePoint now = clock_.Now();
  std::vector<Lease> all;
  for (const auto& [epoch, lease] : leases_) {
    if (lease.expires > now) all.push_back(lease);
  }
  std::sort(all.begin(), all.end(),
            [](const Lease& a, const Lease& b) { return a.epoch < b.epoch; });
  return all;
}

std::optional<Lease> LeaseTable::End(Epoch epoch) {
  auto it = leases_.find(epoch);
  if (it == leases_.end()) return std::nullopt;
  Lease lease = std::move(it->second);
  leases_.erase(it);
  return lease;
}

template <typename Predicate>
std::vector<Lease> LeaseTable::EndWhere(Predicate predicate) {
  std::vector<Lease> ended;
  for (auto it = leases_.begin(); it != leases_.end();) {
    if (predicate(it->second)) {
      ended.push_back(std::move(it->second));
      it = leases_.erase(it);
    } else {
      ++it;
    }
  }
  // In the order of granting: what follows from it (drops, logs) does not depend on the hash.
  std::sort(ended.begin(), ended.end(),
            [](const Lease& a, const Lease& b) { return a.epoch < b.epoch; });
  return ended;
}

std::vector<Lease> LeaseTable::EndConnection(ConnectionId connection) {
  return EndWhere([&](const Lease& lease) { return lease.connection == connection; });
}

std::vector<Lease> LeaseTable::EndContext(ContextId context) {
  return EndWhere([&](const Lease& lease) { return lease.context == context; });
}

std::vector<Lease> LeaseTable::EndExpired() {
  const TimePoint now = clock_.Now();
  return EndWhere([&](const Lease& lease) { return lease.expires <= now; });
}

uint32_t LeaseTable::CountOf(ContextId context) const {
  return static_cast<uint32_t>(
      std::count_if(leases_.begin(), leases_.end(),
                    [&](const auto& entry) { return entry.second.context == context; }));
}

}  // namespace icecache
