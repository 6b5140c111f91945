#include "cacheserver/extent_keys.h"

#include <algorithm>
#include <utility>

namespace icecache {

ExtentKeys::ExtentKeys(PagePool& pool, Transport& transport, MetricsRegistry& metrics)
    : pool_(pool),
      transport_(transport),
      given_(
          metrics.GetCounter("icecache_extent_keys_given_total",
                             "Keys of extents given to workers that read them over the network.")) {
  pool_.OnExtentDropped(this, [this](uint64_t serial) { readable_.erase(serial); });
}

ExtentKeys::~ExtentKeys() { pool_.OnExtentDropped(this, {}); }

Result<wire::ExtentKeysReply> ExtentKeys::KeysFor(TenantId tenant,
                                                  std::span<const uint64_t> serials) {
  wire::ExtentKeysReply reply;
  for (const PagePool::ExtentInfo& extent : pool_.ExtentsOf(tenant)) {
    if (std::find(serials.begin(), serials.end(), extent.serial) == serials.end()) continue;
    auto known = readable_.find(extent.serial);
    if (known == readable_.end()) {
      KV_ASSIGN_OR_RETURN(std::unique_ptr<ReadableMemory> memory,
                          transport_.MakeReadable(extent.memory));
      known = readable_.emplace(extent.serial, std::move(memory)).first;
    }
    const std::span<const std::byte> key = known->second->key();
    reply.serials.push_back(extent.serial);
    reply.keys.emplace_back(key.begin(), key.end());
  }
  given_.Add(reply.keys.size());
  return reply;
}

}  // namespace icecache
