// Maxima of the cold tier and of durable publication; the rest of the system's are in limits.h.
#pragma once

#include "common/limits.h"

namespace icecache::limits {

inline constexpr uint32_t kColdThreadsMax = 64;
inline constexpr uint32_t kStoreBatchPages = 64;             // pages of one write
inline constexpr uint32_t kLoadBatchPages = 16;              // pages that one thread reads in a row
inline constexpr milliseconds kPromotionTime{2000};          // a request's wait for pages or room
inline constexpr milliseconds kTierInterval{50};             // how often a shard looks at its watermarks
inline constexpr milliseconds kStoreRetryTime{5000};         // after a failed write, until the next
inline constexpr uint32_t kPromotionsMax = 4096;             // requests of a shard that wait for pages
inline constexpr milliseconds kPublishDeadline{600000};      // of a durable publication

}  // namespace icecache::limits
