// Every maximum of the system. A queue, pool, loop or message without a line here is a bug.
// Values are generous for the largest public models and small enough to reject nonsense early.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace icecache::limits {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Model shapes.
inline constexpr uint32_t kLayersMax = 256;
inline constexpr uint32_t kKvHeadsMax = 128;
inline constexpr uint32_t kGroupMax = 16;  // query heads per kv head
inline constexpr uint32_t kHeadDimMax = 256;
inline constexpr uint32_t kPageTokens = 16;  // rows of a page; also the paper's page
inline constexpr uint32_t kVocabMax = 1u << 20;

// Contexts.
inline constexpr uint32_t kContextTokensMax = 4u << 20;
inline constexpr uint32_t kSegmentsPerContextMax = 64;
inline constexpr uint32_t kContextsMax = 1u << 16;
inline constexpr uint32_t kContextNameBytesMax = 200;
inline constexpr uint32_t kSinkTokensMax = 256;
inline constexpr uint32_t kWindowTokensMax = 4096;
inline constexpr uint32_t kPendingTokensMax =
    64;  // appended rows a slice may hold before indexing them
inline constexpr uint32_t kReclusterTokens =
    1024;  // new tokens in a slice that start a background re-clustering

// Selection.
inline constexpr uint32_t kPagesPerSelectMax = 4096;  // per kv head
inline constexpr uint32_t kReadCapMax = 1u << 16;     // tokens read exactly for the residual
inline constexpr uint32_t kHeadsPerSelectMax = kKvHeadsMax;

// Messages.
inline constexpr size_t kControlMessageBytesMax = 1u << 20;
inline constexpr size_t kDataMetaBytesMax = 16u << 20;
inline constexpr size_t kDataBodyBytesMax = 256u << 20;
inline constexpr uint32_t kPutRowsTokensMax = 1024;     // tokens of one PutRows message
inline constexpr uint32_t kRequestsInFlightMax = 1024;  // per channel
inline constexpr uint32_t kBodyPartsMax = 1u << 16;
inline constexpr uint32_t kConnectionsMax = 4096;

// Time.
inline constexpr milliseconds kHeartbeatInterval{200};
inline constexpr int kHeartbeatMisses = 5;  // silent intervals after which a peer is dead
inline constexpr milliseconds kRequestDeadline{5000};  // default of a data request
inline constexpr milliseconds kControlDeadline{10000};
inline constexpr milliseconds kLeaseTime{10000};
inline constexpr milliseconds kDrainTimeout{20000};
inline constexpr milliseconds kReconnectBackoffMin{20};
inline constexpr milliseconds kReconnectBackoffMax{1000};
inline constexpr microseconds kSpinBeforeArm{50};  // busy polling before sleeping; 0 on one core

// Threads and memory.
inline constexpr uint32_t kShardsMax = 64;
inline constexpr size_t kExtentBytes = 8u << 20;  // unit of tenant ownership in the page pool
inline constexpr size_t kPoolBytesMin = 16u << 20;

// HTTP admin.
inline constexpr size_t kHttpRequestBytesMax = 64u << 10;
inline constexpr uint32_t kHttpConnectionsMax = 64;

}  // namespace icecache::limits
