// Requests that wait: for pages or indexes that are in the cold store, or for memory that becomes
// free when sealed segments have been stored. A request stays as it came and is made again from the
// start, which its position, epoch and lease make harmless.
#include <utility>

#include "cacheserver/data_service.h"
#include "common/limits.h"

namespace icecache {

// From now on; never, of who says nothing of it.
TimePoint DataService::EndOfPatience(const InMessage& message) const {
  return message.patience > Duration(0) ? reactor_.clock().Now() + message.patience
                                        : TimePoint::max();
}

Result<DataService::RequestId> DataService::KeepCurrent() {
  Request& request = *requests_.at(current_);  // without a tenant nothing is asked of a context
  const TimePoint now = reactor_.clock().Now();
  if (request.give_up && now >= *request.give_up) {
    return DeadlineExceeded("what the request needs could not be brought into memory within " +
                            std::to_string(limits::kPromotionTime.count()) +
                            " ms; the disk is slow or memory is short");
  }
  if (!request.give_up) {
    if (requests_waiting_ >= limits::kPromotionsMax) {
      return ResourceExhausted(std::to_string(requests_waiting_) +
                               " requests of this shard wait for the disk, the maximum");
    }
    request.give_up = now + limits::kPromotionTime;
  }
  request.waits = true;
  return current_;
}

Status DataService::WaitForPages(const Misses& misses) {
  KV_ASSIGN_OR_RETURN(const RequestId kept, KeepCurrent());
  ++requests_waiting_;
  shard_.tier().Load(misses, [this, kept, alive = std::weak_ptr<int>(alive_)](const Status& s) {
    if (alive.expired()) return;
    if (s.code() == StatusCode::kResourceExhausted) return AgainWhenRoom(kept, s);
    --requests_waiting_;
    Again(kept, s);
  });
  return OkStatus();
}

Status DataService::WaitForRoom(const Status& status) {
  const Result<RequestId> kept = KeepCurrent();
  if (!kept.ok()) return status;
  ++requests_waiting_;
  AgainWhenRoom(*kept, status);
  const auto request = requests_.find(*kept);  // gone: there was no room to wait for
  if (request == requests_.end() || request->second->message.kind != wire::kPutRows) {
    return OkStatus();
  }
  const auto connection = connections_.find(request->second->connection);
  if (connection != connections_.end()) connection->second->put_waits = *kept;
  return OkStatus();
}

// REQUIRES: it is counted in requests_waiting_.
void DataService::AgainWhenRoom(RequestId kept, const Status& status) {
  shard_.tier().WaitForRoom([this, kept, status, alive = std::weak_ptr<int>(alive_)](bool room) {
    if (alive.expired()) return;
    --requests_waiting_;
    Again(kept, room ? OkStatus() : status);
  });
}

// At once, not when its turn comes again: pages that were brought for it are held no longer than
// this call. Its tenant pays for it.
void DataService::Again(RequestId kept, const Status& status) {
  const auto it = connections_.find(requests_.at(kept)->connection);
  if (it == connections_.end()) {
    requests_.erase(kept);
    return;
  }
  const TenantWork::Meter meter(shard_.work(), *it->second->tenant);
  Serve(kept, status);
}

void DataService::Serve(RequestId id, const Status& status) {
  const std::shared_ptr<Request> request = requests_.at(id);
  request->waits = false;
  const auto it = connections_.find(request->connection);
  if (it == connections_.end()) {
    requests_.erase(id);
    return;
  }
  Connection& connection = *it->second;  // closed ones live until the next turn
  const bool was_first = connection.put_waits == id;
  if (was_first) connection.put_waits = 0;
  if (!status.ok()) {
    Refuse(connection, request->message, status);
  } else if (connection.put_waits != 0 &&
             (request->message.kind == wire::kPutRows || request->message.kind == wire::kBuild)) {
    StandBehind(connection, id);
  } else {
    const RequestId outer = std::exchange(current_, id);
    Handle(connection, request->message);
    current_ = outer;
  }
  // Where it waited and all was there at once, it has been answered inside of Handle.
  if (request->waits) return;
  requests_.erase(id);
  while (was_first && connection.put_waits == 0 && !connection.puts_behind.empty()) {
    const RequestId next = connection.puts_behind.front();
    connection.puts_behind.pop_front();
    Serve(next, OkStatus());
  }
}

void DataService::StandBehind(Connection& connection, RequestId id) {
  Request& request = *requests_.at(id);
  if (connection.puts_behind.size() >= limits::kPromotionsMax) {
    return Refuse(connection, request.message,
                  ResourceExhausted(std::to_string(connection.puts_behind.size()) +
                                    " requests of this connection wait for room, the maximum"));
  }
  request.waits = true;
  connection.puts_behind.push_back(id);
}

}  // namespace icecache
