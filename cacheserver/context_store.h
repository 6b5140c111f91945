// ContextStore: what the control plane does with the cold store. Finds durable contexts at start,
// commits and forgets them, and reads what a context needs before it can be opened.
//
// A publication: every shard has written its part of every segment (Tier::Store) -> Commit writes the
// context's record, and all of it is flushed to disk. A crash before that leaves blobs that
// no record names; Recover deletes them. So a context is there whole or not at all.
//
// Lifecycle: 1. Recover, before threads are started -> 2. the rest, from the control thread; answers
// come there. Commits and deletions happen in the order of the calls.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cacheserver/context/manifest.h"
#include "cacheserver/store/cold_pool.h"
#include "common/reactor.h"

namespace icecache {

class ContextStore {
 public:
  // Borrows both; the pool is stopped before the reactor ends.
  ContextStore(Reactor& control, ColdPool& pool) : control_(control), pool_(pool) {}
  ContextStore(const ContextStore&) = delete;
  ContextStore& operator=(const ContextStore&) = delete;

  struct Recovered {
    std::vector<ContextManifest> contexts;  // in the order of their last segments
    uint64_t first_id = 1;                  // for segments and epochs: never used before
    uint64_t orphans = 0;                   // segments that no context names; being deleted
    uint64_t unreadable = 0;                // records that are kept and not offered; in the log
  };
  // Writes down that `first_id` and what follows is in use, durably. now_us: microseconds since 1970.
  // FAILED_PRECONDITION when a newer server has written here; DATA_LOSS; what the store says.
  Result<Recovered> Recover(uint64_t now_us);

  // OK: the context is on disk and found at the next start. A Forget of it that has not succeeded yet
  // is given up: it would delete this record.
  void Commit(const ContextManifest& manifest, std::function<void(Status)> done);
  // Deletes the record, then these segments, which no other context names. Answers once, when the
  // record is gone or could not be deleted (disk full); then it is tried again every
  // kStoreRetryTime.
  void Forget(const ContextManifest& manifest, std::vector<SegmentId> segments,
              std::function<void(Status)> done);
  // Segments that no context names any more. They go when every record that is to go has gone: one
  // of those may name them.
  void DeleteSegments(const std::vector<SegmentId>& segments);

  // The plain rows of all slices of these segments, [segment][layer * kv_heads + head].
  using Rows = std::vector<std::vector<std::string>>;
  void ReadRows(std::vector<SegmentId> segments, uint32_t slices,
                std::function<void(Result<std::shared_ptr<const Rows>>)> done);

 private:
  // A record that is to go. `again` is set when it was committed anew.
  struct Forgetting {
    std::string key;
    std::vector<SegmentId> segments;
    bool again = false;
  };
  void ForgetOnce(const std::shared_ptr<Forgetting>& record, std::function<void(Status)> done);
  void EndForgetting(const std::shared_ptr<Forgetting>& record);
  template <typename T>
  void Answer(std::function<void(T)> done, T value);

  Reactor& control_;
  ColdPool& pool_;
  std::vector<std::shared_ptr<Forgetting>> forgetting_;  // records that are to go and are still there
  std::vector<SegmentId> unnamed_;  // segments that wait for those
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
