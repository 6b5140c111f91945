// ColdPool: the threads that talk to the cold store, and the store's health.
//
// Reads and bulk writes run side by side; record writes run one after the other in the order of
// submission, so that a commit and the deletion that follows it cannot change places. Tasks own
// nothing that must die on a shard's thread, so dropping one at Stop is harmless.
//
// A write that fails (disk full, corruption) is an alert in the log and in
// icecache_cold_store_degraded; for kStoreRetryTime further writes are refused with its status and
// the server goes on with what is in memory. Reads are always tried. Lifecycle: Submit* -> Stop.
// Thread: any.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "cacheserver/store/cold_store.h"
#include "common/clock.h"
#include "common/ids.h"
#include "common/metrics.h"

namespace icecache {

class ColdPool {
 public:
  // `clock` and `metrics` outlive it.
  ColdPool(std::unique_ptr<ColdStore> store, uint32_t threads, const Clock& clock,
           MetricsRegistry& metrics);
  ~ColdPool();  // Stop
  ColdPool(const ColdPool&) = delete;
  ColdPool& operator=(const ColdPool&) = delete;

  void Submit(std::function<void()> task);
  void SubmitRecord(std::function<void()> task);
  // Waits for what runs, drops what waits.
  void Stop();

  ColdStore& store() { return *store_; }
  // OK, or the failure of a recent write.
  Status WriteHealth() const;
  // Every outcome of a write to the store passes through here and comes back unchanged.
  Status NoteWrite(Status status);

  // Who writes a segment says so, and a segment that is to go is deleted when nobody writes it any
  // more. BeginWrite: false when it is to go.
  bool BeginWrite(SegmentId segment);
  void EndWrite(SegmentId segment);
  // Later: pages, indexes, and at last its record. Harmless when there is nothing.
  void DeleteSegment(SegmentId segment);

 private:
  struct Impl;
  const std::unique_ptr<ColdStore> store_;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
