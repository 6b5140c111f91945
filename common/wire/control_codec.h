// Control-plane messages as plain structs, with encode and checked decode (schema: control.capnp), and the
// framing on a stream: u32 little-endian count of 8-byte words, then one flat Cap'n Proto message.
//
// Decoding checks names, sizes and shapes against common/limits.h. Cap'n Proto stays behind control_codec.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/prefix_key.h"
#include "common/status.h"
#include "common/wire/protocol_version.h"

namespace icecache::wire {

struct SegmentInfo {
  SegmentId id;
  uint32_t tokens = 0;
  bool sealed = false;
  uint32_t references = 0;
  uint64_t bytes = 0;
  uint64_t index_bytes = 0;
  uint32_t merged = 0;  // segments that were put together in it; 0: it is what was appended
};
struct ContextInfo {
  ContextId id;
  std::string name;
  ModelShape shape;
  std::string model;
  uint32_t tokens = 0;
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;
  uint32_t tail_tokens = 0;
  std::string policy;
  uint64_t seed = 0;
  bool sealed = false;
  bool published = false;
  bool durable = false;
  bool shared = false;
  uint32_t prefix_keys = 0;
  uint64_t prefix_forks = 0;
  uint64_t prefix_tokens = 0;
  std::vector<SegmentInfo> segments;
  std::string tenant;
};
struct Grant {
  ContextInfo context;
  Epoch epoch;
  std::vector<std::byte> ticket;
  uint32_t lease_ms = 0;
};

// Requests.
struct Hello { uint16_t protocol_version = kProtocolVersion; std::string tenant, secret, client; };
struct Create {
  std::string name;
  ModelShape shape;
  std::string model;
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;
  std::string policy;
  uint64_t seed = 1;
};
struct Open { std::string name; };
struct Fork {
  std::string parent, name;
  uint32_t tokens = 0;             // 0: all
  std::string owner;               // tenant of a shared parent; empty: the caller's own
  std::optional<PrefixKey> key{};  // that these tokens must have
};
// keys: as PrefixKeys() of all its tokens, or empty.
struct Seal { ContextId context; std::vector<PrefixKey> keys{}; };
struct Publish { ContextId context; bool durable = false; bool shared = false; };
struct MatchPrefix {
  std::vector<PrefixKey> keys;  // of whole blocks, in order
  uint32_t tokens = 0;          // longest prefix that is of use
  bool shared = false;          // also what other tenants have shared
};
struct Release { ContextId context; };
struct Drop { std::string name; };
struct List {};
struct Describe { std::string name; };
struct Renew {};
// What a report is about. A tenant sees what is its own, an admin everything.
enum class InspectTopic : uint8_t {
  kContexts = 0,
  kTenants = 1,
  kLeases = 2,
  kMemory = 3,
  kExplain = 4,  // one context: where its pages are, what its last selections covered, or why it is gone
  kVerify = 5,   // reads all pages of one context, or of all, against their checksums
};
inline constexpr uint8_t kInspectTopics = 6;
struct Inspect { InspectTopic topic = InspectTopic::kContexts; std::string name; };
struct Drain {};
// The worker's frames, or none, from now until it says otherwise or its connection ends. Answered
// with SharedFramesList.
struct ShareFrames {
  std::string host;                     // within which frames are shared
  std::vector<std::byte> memory;        // a memory handle (kernels/gpu/memory_handle.h), or empty
  std::vector<std::byte> directory{};  // a name (worker/page_directory.h); empty without memory
};
struct ControlRequest {
  uint64_t id = 0;
  std::variant<Hello, Create, Open, Fork, Seal, Publish, Release, Drop, List, Describe, Renew, Inspect, Drain,
               MatchPrefix, ShareFrames> body;
};

// Replies.
struct HelloReply {
  uint16_t protocol_version = kProtocolVersion;
  std::string version;
  std::vector<std::string> shards;  // data-plane address of each shard, in order
  uint32_t heartbeat_ms = 0;
};
struct Done {};
struct ContextList { std::vector<ContextInfo> contexts; };
struct Report { std::string json; };
struct PrefixCandidate {
  std::string owner, name;
  uint32_t tokens = 0;
  PrefixKey key{};
};
struct Prefixes { std::vector<PrefixCandidate> candidates; };  // longest first
struct SharedFrames {
  uint64_t id = 0;
  std::vector<std::byte> memory, directory;
};
struct SharedFramesList { std::vector<SharedFrames> others; };
struct ControlReply {
  uint64_t id = 0;
  std::variant<Status, HelloReply, Grant, Done, ContextList, Report, Prefixes, SharedFramesList> body;  // Status: an error
};

// A whole frame, ready to write. A reply that would exceed kControlMessageBytesMax (a list of very many contexts)
// becomes RESOURCE_EXHAUSTED; an error message above kStatusTextBytesMax is cut.
std::vector<std::byte> EncodeFrame(const ControlRequest& request);
std::vector<std::byte> EncodeFrame(const ControlReply& reply);

// Bytes of the frame whose first 4 bytes are given (the 4 included); INVALID_ARGUMENT above kControlMessageBytesMax.
inline constexpr size_t kFrameHeaderBytes = 4;
Result<size_t> FrameBytes(std::span<const std::byte, kFrameHeaderBytes> header);
Result<ControlRequest> DecodeRequest(std::span<const std::byte> frame);  // whole frame
Result<ControlReply> DecodeReply(std::span<const std::byte> frame);

}  // namespace icecache::wire
