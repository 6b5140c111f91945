// BuildPool: the threads that cluster pages away from the shards. First come, first served.
//
// Lifecycle: 1. Submit* (any thread) -> 2. Stop: waits for what runs, drops what waits. Tasks own
// nothing that must die on a shard's thread (the shard keeps its jobs and lends them), so dropping
// one is harmless. Stop comes before the shards end. Each shard bounds what it submits
// (kBuildsQueuedMax).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace icecache {

class BuildPool {
 public:
  explicit BuildPool(uint32_t threads);
  ~BuildPool();  // Stop
  BuildPool(const BuildPool&) = delete;
  BuildPool& operator=(const BuildPool&) = delete;

  void Submit(std::function<void()> task);
  void Stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
