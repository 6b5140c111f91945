// Maxima of page sharing (worker/page_sharing.h), beside those of limits.h.
#pragma once

#include "common/limits.h"

namespace icecache::limits {

// Frames of a worker's device that other workers of its host and tenant read.
inline constexpr uint32_t kSharedFramesMax = 1u << 22;  // of a worker
inline constexpr uint32_t kSharingWorkersMax = 32;      // of a tenant, per host; above: refused
inline constexpr uint32_t kOfferedPagesMax = 512;       // of others, per head and request
inline constexpr size_t kDirectoryNameBytesMax = 64;
inline constexpr milliseconds kSharingInterval{1000};  // how often a worker asks who shares

}  // namespace icecache::limits
