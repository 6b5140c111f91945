// ExtentKeys: makes extents readable to the workers of their tenant over the network, without this
// process's doing (reply mode "remote", docs/protocol.md).
//
// An extent is registered when a worker first asks for its key, on its own, so that a key ends
// where the extent does, and extents end at their tenant; the registration goes when the extent
// does. What a key allows it allows for that long, also after the lease that it was given under has
// ended: the extent holds nothing but rows of that tenant until then. Thread: the shard's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>

#include "cacheserver/store/page_pool.h"
#include "common/metrics.h"
#include "common/transport.h"
#include "common/wire/extent_codec.h"

namespace icecache {

class ExtentKeys {
 public:
  // Both outlive it.
  ExtentKeys(PagePool& pool, Transport& transport, MetricsRegistry& metrics);
  ~ExtentKeys();
  ExtentKeys(const ExtentKeys&) = delete;
  ExtentKeys& operator=(const ExtentKeys&) = delete;

  // Keys of those of `serials` that are extents of the tenant; others are left out.
  // RESOURCE_EXHAUSTED: memory cannot be registered.
  Result<wire::ExtentKeysReply> KeysFor(TenantId tenant, std::span<const uint64_t> serials);

  size_t registered_count() const { return readable_.size(); }

 private:
  PagePool& pool_;
  Transport& transport_;
  Counter& given_;
  std::unordered_map<uint64_t, std::unique_ptr<ReadableMemory>> readable_;  // by serial
};

}  // namespace icecache
