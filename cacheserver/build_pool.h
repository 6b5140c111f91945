// BuildPool: the threads that cluster pages away from the shards. Tenants take turns by weight
// (FairQueue), so that one tenant's large prefill does not stand before everybody's small one.
//
// Lifecycle: 1. Submit* (any thread) -> 2. Stop: waits for what runs, drops what waits. Tasks own
// nothing that must die on a shard's thread (the shard keeps its jobs and lends them), so dropping
// one is harmless. Stop comes before the shards end. Each shard bounds what it submits
// for a tenant (kBuildsQueuedMax).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "common/ids.h"

namespace icecache {

class BuildPool {
 public:
  explicit BuildPool(uint32_t threads);
  ~BuildPool();  // Stop
  BuildPool(const BuildPool&) = delete;
  BuildPool& operator=(const BuildPool&) = delete;

  // 1 unless set. Any thread.
  void SetWeight(TenantId tenant, uint32_t weight);
  void Submit(TenantId tenant, std::function<void()> task);
  void Stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
