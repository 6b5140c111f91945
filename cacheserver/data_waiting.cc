// Requests that wait: for pages or indexes that are in the cold store, or for memory that becomes
// free when sealed segments have been stored. A request is kept as it came and made again from the
// start, which its position, epoch and lease make harmless.
#include <utility>

#include "cacheserver/data_service.h"
#include "common/limits.h"

namespace icecache {
namespace {

// Between tries when pages of other requests hold all frames.
constexpr Duration kFramesPause = std::chrono::milliseconds(2);

}  // namespace

struct DataService::Waiting {
  uint64_t connection = 0;
  InMessage message;  // of these bytes
  std::vector<std::byte> meta, body;
  TimePoint deadline;
};

Result<std::shared_ptr<DataService::Waiting>> DataService::Keep(const Connection& connection,
                                                                const InMessage& message) {
  if (current_ != nullptr) {  // it has waited before
    if (reactor_.clock().Now() < current_->deadline) return current_;
    return DeadlineExceeded("what the request needs could not be brought into memory within " +
                            std::to_string(limits::kPromotionTime.count()) +
                            " ms; the disk is slow or memory is short");
  }
  if (requests_waiting_ >= limits::kPromotionsMax) {
    return ResourceExhausted(std::to_string(requests_waiting_) +
                             " requests of this shard wait for the disk, the maximum");
  }
  auto kept = std::make_shared<Waiting>();
  kept->connection = connection.id;
  kept->meta.assign(message.meta.begin(), message.meta.end());
  kept->body.assign(message.body.begin(), message.body.end());
  kept->message = message;
  kept->message.meta = kept->meta;
  kept->message.body = kept->body;
  kept->deadline = reactor_.clock().Now() + limits::kPromotionTime;
  return kept;
}

Status DataService::WaitForPages(const Connection& connection, const InMessage& message,
                                 const Misses& misses) {
  KV_ASSIGN_OR_RETURN(const std::shared_ptr<Waiting> kept, Keep(connection, message));
  ++requests_waiting_;
  shard_.tier().Load(misses, [this, kept, alive = std::weak_ptr<int>(alive_)](Status status) {
    if (alive.expired()) return;
    --requests_waiting_;
    if (status.code() == StatusCode::kResourceExhausted) {
      WaitForFrames(kept, status);
    } else {
      Again(kept, status);
    }
  });
  return OkStatus();
}

Status DataService::WaitForRoom(const Connection& connection, const InMessage& message,
                                const Status& status) {
  const Result<std::shared_ptr<Waiting>> kept = Keep(connection, message);
  if (!kept.ok()) return status;
  ++requests_waiting_;
  shard_.tier().WaitForRoom(
      [this, kept = *kept, status, alive = std::weak_ptr<int>(alive_)](bool room) {
        if (alive.expired()) return;
        --requests_waiting_;
        Again(kept, room ? OkStatus() : status);
      });
  return OkStatus();
}

void DataService::WaitForFrames(const std::shared_ptr<Waiting>& kept, const Status& status) {
  ++requests_waiting_;
  const auto again = [this, kept, alive = std::weak_ptr<int>(alive_)](const Status& s) {
    if (alive.expired()) return;
    --requests_waiting_;
    Again(kept, s);
  };
  shard_.tier().WaitForRoom([this, again, kept, status](bool room) {
    if (room) return again(OkStatus());
    const bool late = reactor_.clock().Now() >= kept->deadline;
    if (late) return again(status);
    (void)reactor_.After(kFramesPause, [again] { again(OkStatus()); });
  });
}

void DataService::Again(const std::shared_ptr<Waiting>& kept, Status status) {
  const auto it = connections_.find(kept->connection);
  if (it == connections_.end()) return;
  if (status.ok()) {
    current_ = kept;
    Handle(*it->second, kept->message);
    current_.reset();
    return;
  }
  Count(kept->message.kind, status.code());
  it->second->channel->ReplyError(kept->message.id, status);
}

}  // namespace icecache
