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

// Model files.
inline constexpr size_t kJsonFileBytesMax = 256u << 20;      // config.json, tokenizer.json, weight index
inline constexpr size_t kWeightHeaderBytesMax = 100u << 20;  // safetensors' own maximum
inline constexpr uint32_t kWeightFilesMax = 1024;
inline constexpr uint32_t kComputeThreadsMax = 64;
inline constexpr uint32_t kWordCacheMax = 1u << 16;          // distinct words remembered within one Encode

// Contexts.
inline constexpr uint32_t kContextTokensMax = 4u << 20;
inline constexpr uint32_t kSegmentsPerContextMax = 64;
inline constexpr uint32_t kContextsMax = 1u << 16;
inline constexpr uint32_t kContextNameBytesMax = 200;
inline constexpr uint32_t kPrefixBlockTokens = 256;        // tokens between two keys of a prefix
inline constexpr uint32_t kPrefixKeysMax = 1u << 20;       // that the server remembers; 100 MB
inline constexpr uint32_t kPrefixCandidatesMax = 16;       // answers to one question for a prefix
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
inline constexpr uint32_t kCheckTokensMax = 1u << 18;  // of a slice that a checked selection reads
inline constexpr uint32_t kBudgetGrowthMax = 64;      // times the budget, to reach --min-mass
inline constexpr uint32_t kSelectsPerBatchMax = 64;   // Selects in one message; sequences that decode together
inline constexpr uint32_t kBatchRequestsMax = 1u << 16;  // of `generate --requests`
inline constexpr uint32_t kNearPositionsMax = 4096;   // of a head; more would be everywhere
inline constexpr uint32_t kLayerReuseMax = 16;        // layers that search where an anchor looked

// Messages.
inline constexpr size_t kControlMessageBytesMax = 1u << 20;
inline constexpr size_t kDataMetaBytesMax = 16u << 20;
inline constexpr size_t kDataBodyBytesMax = 256u << 20;
inline constexpr uint32_t kPutRowsTokensMax = 1024;     // tokens of one PutRows message
inline constexpr uint32_t kRequestsInFlightMax = 1024;  // per channel
inline constexpr uint32_t kTextBytesMax = 512;         // model, policy, version, address, client, tenant
inline constexpr uint32_t kSecretBytesMax = 1024;
inline constexpr uint32_t kTicketBytesMax = 256;
inline constexpr uint32_t kStatusTextBytesMax = 4096;  // longer messages are cut when encoded
inline constexpr uint32_t kWireNestingMax = 8;         // pointers deep; the schemas need 4
inline constexpr uint32_t kBodyPartsMax = 1u << 16;
inline constexpr uint32_t kConnectionsMax = 4096;
inline constexpr uint32_t kSendWindowMessages = 1024;  // handed to UCX and not complete, per connection; bounds reordering
inline constexpr size_t kReceiveHeldBytesMax = 1u << 30;   // per connection, out of order or in flight
inline constexpr size_t kReceiveCacheBytesMax = 64u << 20;   // idle receive buffers kept, per transport
inline constexpr size_t kNumbersKeptMax = 256;  // of descriptors (common/ucx_peer.h); some per connection that closed
inline constexpr milliseconds kNumbersKeptTime{15000};  // who attaches late has given up by then

// Time.
inline constexpr milliseconds kHeartbeatInterval{200};
inline constexpr int kHeartbeatMisses = 5;  // silent intervals after which a peer is dead, on both planes
inline constexpr milliseconds kSilenceAnnouncedMax{60000};  // Channel::AnnounceSilence
inline constexpr milliseconds kRequestDeadline{5000};  // default of a data request
inline constexpr milliseconds kControlDeadline{10000};
inline constexpr milliseconds kPrefetchDeadline{10000};  // of a question sent ahead: it waits for its step
inline constexpr milliseconds kLeaseTime{10000};
inline constexpr milliseconds kDrainTimeout{20000};
inline constexpr milliseconds kReconnectBackoffMin{20};
inline constexpr milliseconds kReconnectBackoffMax{1000};
inline constexpr uint32_t kTimersMax = 1u << 17;        // per reactor
inline constexpr microseconds kSpinBeforeArm{50};  // busy polling before sleeping; 0 on one core

// Threads and memory.
inline constexpr uint32_t kShardsMax = 64;
inline constexpr size_t kExtentBytes = 8u << 20;  // unit of tenant ownership in the page pool
inline constexpr size_t kPoolBytesMin = 16u << 20;

// Extents handed to workers on the same host.
inline constexpr uint32_t kExtentSocketNameBytesMax = 64;
inline constexpr uint32_t kExtentsPerReplyMax = 64;          // descriptors in one message; the kernel takes 253
inline constexpr uint32_t kExtentSocketConnectionsMax = 256; // per shard
inline constexpr milliseconds kExtentWaitMax{750};           // a worker's wait for extents; then pages come inline
inline constexpr milliseconds kExtentIdleMax{10000};         // an extent that no page named for so long is unmapped

// Pages on their way into a device's frames (kernels/gpu/page_intake.h).
inline constexpr size_t kLandingBytes = 8u << 20;        // each of two halves, on either side of the bus
inline constexpr uint32_t kIntakePagesMax = 128u << 10;  // whose verdicts are kept

// Memory of a worker's device that servers on its host push pages into (kernels/gpu/push_buffer.h).
inline constexpr size_t kMemoryHandleBytesMax = 256;
inline constexpr size_t kPushBytes = 16u << 20;              // of a worker
inline constexpr size_t kPushRegionBytesMax = 4u << 20;      // of a reply; what does not fit comes in its body
inline constexpr uint32_t kPushTargetsMax = 256;             // per shard; of connections
inline constexpr uint32_t kPushesQueuedMax = 256;            // per shard and GPU; above: pages come in the body
inline constexpr uint32_t kPushDevicesMax = 16;              // per shard

// Frames of a worker's device that other workers of its host and tenant read
// (worker/page_sharing.h).
inline constexpr uint32_t kSharedFramesMax = 1u << 22;       // of a worker
inline constexpr uint32_t kSharingWorkersMax = 32;           // of a tenant, per host; above: refused
inline constexpr uint32_t kOfferedPagesMax = 512;            // of others, per head and request
inline constexpr size_t kDirectoryNameBytesMax = 64;
inline constexpr milliseconds kSharingInterval{1000};        // how often a worker asks who shares

// One-sided reads of a peer's memory.
inline constexpr size_t kMemoryKeyBytesMax = 512;
inline constexpr uint32_t kMemoryKeysMax = 4096;    // known to one connection
inline constexpr uint32_t kMemoryReadsMax = 1024;   // in flight on one connection

// Server: connections, leases, work in flight.
inline constexpr uint32_t kLeasesMax = 1u << 16;
inline constexpr uint32_t kTenantsMax = 1024;
inline constexpr uint32_t kTenantWeightMax = 100;
inline constexpr uint32_t kTenantRequestsQueuedMax = 4096;      // of a tenant, per shard; above: refused
inline constexpr size_t kTenantBytesQueuedMax = 1u << 30;       // likewise
inline constexpr microseconds kServiceTurn{20};                 // a shard serves so long, then looks for what has come
inline constexpr size_t kTokenFileBytesMax = 1u << 20;
inline constexpr uint32_t kControlRequestsInFlightMax = 32;     // per control connection
inline constexpr size_t kControlReplyBytesQueuedMax = 8u << 20; // per control connection; above: closed
inline constexpr uint32_t kAttachmentsPerConnectionMax = 256;   // contexts attached on one data connection
inline constexpr size_t kReplyBytesQueuedMax = 256u << 20;      // per data connection; above: refused
inline constexpr uint32_t kBuildsQueuedMax = 4096;              // per shard and tenant: running or waiting for a thread
inline constexpr size_t kScratchKeptBytesMax = size_t{96} << 20;    // a thread that builds keeps so much for its next build
inline constexpr uint32_t kReclustersInFlightMax = 4;           // per shard
inline constexpr milliseconds kHelloTimeout{5000};              // a control connection must say Hello within
inline constexpr milliseconds kAttachTimeout{10000};            // a data connection must attach within

// Merging of small sealed segments (docs/adr/0019-merging-segments.md).
inline constexpr uint32_t kMergeGrowth = 4;         // a segment joins those behind it that hold more than a quarter of it
inline constexpr uint32_t kMergedTokensDefault = 128u << 10;  // of a merged segment, at most: --merge-tokens
inline constexpr uint32_t kMergeCopyShare = 8;      // of a tenant's bytes, an eighth may be held twice for merging
inline constexpr uint32_t kMergeMemoryShare = 8;    // of a shard's memory, an eighth may be taken by a merge
inline constexpr milliseconds kMergeInterval{1000};     // how often chains are looked at
inline constexpr milliseconds kMergeQuietTime{3000};    // a run stands so long before it is merged
inline constexpr milliseconds kMergePause{100};         // of a shard's merge while something else is clustered
inline constexpr milliseconds kMergeBackoffMin{5000};   // after a merge that came to nothing, until the next try
inline constexpr milliseconds kMergeBackoffMax{600000};

inline constexpr milliseconds kLoopLagInterval{250};            // how often a loop measures its own lag

// Cold tier and durable publication.
inline constexpr size_t kColdKeyBytesMax = 1024;
inline constexpr uint32_t kColdThreadsMax = 64;
inline constexpr uint32_t kStoreBatchPages = 64;             // pages of one write
inline constexpr uint32_t kLoadBatchPages = 16;              // pages that one thread reads in a row
inline constexpr milliseconds kPromotionTime{2000};          // a request's wait for pages or room
inline constexpr milliseconds kTierInterval{50};             // how often a shard looks at its watermarks
inline constexpr milliseconds kStoreRetryTime{5000};         // after a failed write, until the next
inline constexpr milliseconds kForkTime{8000};               // of a fork at an earlier token that waits for room
inline constexpr uint32_t kPromotionsMax = 4096;             // requests of a shard that wait for pages
inline constexpr milliseconds kPublishDeadline{600000};      // of a durable publication

inline constexpr size_t kConfigFileBytesMax = 1u << 20;

// Reports.
inline constexpr uint32_t kSelectionsRememberedMax = 8;  // per context and shard
inline constexpr uint32_t kEndedRememberedMax = 512;     // contexts that are gone, and why
inline constexpr uint32_t kDamageReportedMax = 16;       // per shard and verification

// HTTP admin.
inline constexpr milliseconds kHttpTimeout{5000};               // of one request, from its first byte to the last of its reply
inline constexpr size_t kHttpRequestBytesMax = 64u << 10;
inline constexpr uint32_t kHttpConnectionsMax = 64;

}  // namespace icecache::limits
