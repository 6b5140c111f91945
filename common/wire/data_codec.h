// Data-plane messages as plain structs, with encode and checked decode (schema: data.capnp).
//
// Decoding never trusts: every count is checked against common/limits.h and every body length against what the
// message says before anything is used; the error names the message, the field, found and expected. Decoded spans point into the
// received body and live as long as it. Cap'n Proto stays behind data_codec.cc.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/page_layout.h"
#include "common/status.h"
#include "common/transport.h"
#include "common/wire/protocol_version.h"

namespace icecache::wire {

// OutMessage::kind of requests; a reply repeats the kind of its request.
enum DataKind : uint16_t {
  kAttach = 1,
  kPutRows = 2,
  kBuild = 3,
  kSelect = 4,
  kFetchRows = 5,
  kFetchPages = 6,
  kSelectBatch = 7, kExtentKeys = 8, kOfferMemory = 9,  // select_batch, extent, push_codec.h
};

struct AttachRequest {
  uint16_t protocol_version = kProtocolVersion;
  std::vector<std::byte> ticket;
};
struct AttachReply {
  uint16_t protocol_version = kProtocolVersion;
  ShardId shard;
  uint16_t shard_count = 0;
  std::string extents{};  // name for ConnectExtents (common/extent_socket.h); empty: not offered
  bool pushes = false;  // memory may be offered (push_codec.h)
};

// Names the slices a request is about: heads of one layer, all owned by the addressed shard.
struct SliceSet {
  ContextId context;
  Epoch epoch;
  LayerId layer;
  std::vector<KvHeadId> heads;
};

struct PutRowsRequest {
  SliceSet slices;
  uint32_t first_position = 0;
  uint32_t token_count = 0;
  // Decoded only: body, for head i of slices.heads: k_rows(i), v_rows(i).
  std::span<const std::byte> body;
  std::span<const std::byte> k_rows(size_t head_index, const ModelShape& shape) const;
  std::span<const std::byte> v_rows(size_t head_index, const ModelShape& shape) const;
};
struct PutRowsReply { uint32_t next_position = 0; };

struct BuildRequest {
  SliceSet slices;
  uint32_t token_count = 0;
  std::span<const float> query_energy;       // encode: [heads, head_dim] or empty
  std::vector<float> decoded_query_energy;   // decode: the same, copied (bodies are unaligned)
  std::vector<Packing> layouts;  // proposed, per head, or none; decoded: not yet checked (CheckPacking)
};
struct BuildReply { uint32_t pages = 0; };

struct ResidentPage {
  SegmentId segment;
  PageId page;
  uint32_t version = 0;
  uint8_t fill = 0;
};
struct SelectHead {
  KvHeadId head;
  std::vector<ResidentPage> resident;
  std::vector<float> local_lse;  // [group] or empty
  std::vector<uint32_t> near{};  // positions; empty: look everywhere
};
// SelectRequest::flags. How content that the worker lacks is answered, at most one of the last two:
// in the body (none), named in the tenant's extents, or attended to by the server and merged into
// the residual.
inline constexpr uint8_t kSelectNoResidual = 1;
inline constexpr uint8_t kSelectMapped = 2;
inline constexpr uint8_t kSelectAttend = 4;
inline constexpr uint8_t kSelectInt8 = 8;  // whole pages in the body may come coded in int8
inline constexpr uint8_t kSelectCheck = 16;  // compare with exact attention, for the metrics only
struct SelectRequest {
  ContextId context;
  Epoch epoch;
  LayerId layer;
  std::vector<SelectHead> heads;
  uint32_t max_pages = 0;
  uint32_t read_cap = 0;
  float min_mass = 0;
  uint8_t rank = 0;
  uint8_t flags = 0;
  uint32_t append_first = 0;
  uint32_t append_count = 0;
  uint32_t push_offset = 0, push_bytes = 0;  // region for missing pages; 0 bytes: none
  // Decoded only.
  std::vector<float> queries;             // [heads, group, head_dim]
  std::span<const std::byte> append_body; // for each head K rows [append_count], then V rows
  std::span<const std::byte> append_k(size_t head_index, const ModelShape& shape) const;
  std::span<const std::byte> append_v(size_t head_index, const ModelShape& shape) const;
};
enum class PagePlace : uint8_t {
  kBody = 0,      // rows [from, fill) are in the body
  kMapped = 1,    // they are in the frame at `offset` of extent `extent`
  kAttended = 2,  // the residual holds the whole page; from == fill, and the worker must not attend to it
  kPushed = 3,    // K rows, then V rows, are at `offset` of the offered memory; positions in the body
};
struct PagePayload {
  SegmentId segment;
  PageId page;
  uint32_t version = 0;
  uint8_t fill = 0;
  uint8_t from = 0;  // rows [from, fill) travel; from == fill: the worker has it
  float log_mass = 0;
  uint64_t checksum = 0;
  PagePlace place = PagePlace::kBody;
  uint32_t offset = 0;  // kMapped: of the frame: K rows [kPageTokens], V rows, positions
  uint64_t extent = 0;  // serial; 0 and not sent unless place is kMapped
  // K and V of the whole page as EncodeInt8Rows made them (kernels/int8_rows.h), instead of k_rows
  // and v_rows. Only in the body with from == 0, and shorter than what it stands for.
  uint32_t coded_bytes = 0;
  uint64_t coded_checksum = 0;  // PageChecksum with the code in place of the K rows, no V rows
  std::span<const std::byte> coded{};
  // Decoded only; empty unless the rows are in the body (kPushed: the positions alone).
  std::span<const std::byte> k_rows, v_rows, positions;
};
struct HeadSelection {
  KvHeadId head;
  std::vector<PagePayload> pages;
  std::vector<float> residual;  // AttentionStates::flat [group], or empty
  float covered_mass = 0;
  uint32_t tokens_read = 0;
};
struct SelectReply {
  std::vector<HeadSelection> heads;
  uint64_t select_ns = 0, gather_ns = 0;
  uint32_t next_position = 0;
};

enum class RowsPart : uint16_t { kSinks = 0, kTail = 1, kRange = 2 };
struct FetchRowsRequest {
  SliceSet slices;
  RowsPart part = RowsPart::kSinks;
  uint32_t first_position = 0, token_count = 0;  // kRange only; 1..kPutRowsTokensMax tokens
};
struct FetchRowsReply {
  uint32_t first_position = 0, count = 0;
  uint64_t checksum = 0;
  std::span<const std::byte> body;  // decoded only: for each head K rows [count], then V rows
};
struct FetchPagesRequest {
  ContextId context;
  Epoch epoch;
  LayerId layer;
  KvHeadId head;
  std::vector<ResidentPage> pages;
  uint8_t flags = 0;  // kSelectMapped or none
};

// Encode fills kind and meta of *out; the caller adds body parts (and pin) in the order above.
void Encode(const AttachRequest&, OutMessage* out);
void Encode(const AttachReply&, OutMessage* out);
void Encode(const PutRowsRequest&, OutMessage* out);
void Encode(const PutRowsReply&, OutMessage* out);
void Encode(const BuildRequest&, OutMessage* out);   // adds the body, pinned by the message
void Encode(const BuildReply&, OutMessage* out);
void Encode(const SelectRequest&, OutMessage* out);
void Encode(const SelectReply&, OutMessage* out);    // kind kSelect; the caller sets kFetchPages for that reply
void Encode(const FetchRowsRequest&, OutMessage* out);
void Encode(const FetchRowsReply&, OutMessage* out);
void Encode(const FetchPagesRequest&, OutMessage* out);
void EncodeStatus(const Status&, OutMessage* out);

// `shape`: of the context the message names, needed to check body lengths. Peeking at the context id comes first:
Result<ContextId> PeekContext(const InMessage& message);  // any request but Attach
Result<AttachRequest> DecodeAttachRequest(const InMessage& message);
Result<AttachReply> DecodeAttachReply(const InMessage& message);
Result<PutRowsRequest> DecodePutRowsRequest(const InMessage& message, const ModelShape& shape);
Result<PutRowsReply> DecodePutRowsReply(const InMessage& message);
Result<BuildRequest> DecodeBuildRequest(const InMessage& message, const ModelShape& shape);
Result<BuildReply> DecodeBuildReply(const InMessage& message);
Result<SelectRequest> DecodeSelectRequest(const InMessage& message, const ModelShape& shape);
Result<SelectReply> DecodeSelectReply(const InMessage& message, const ModelShape& shape);
Result<FetchRowsRequest> DecodeFetchRowsRequest(const InMessage& message, const ModelShape& shape);
Result<FetchRowsReply> DecodeFetchRowsReply(const InMessage& message, const ModelShape& shape, size_t head_count);
Result<FetchPagesRequest> DecodeFetchPagesRequest(const InMessage& message, const ModelShape& shape);
Status DecodeStatus(const InMessage& message);  // never OK: a broken error message is INTERNAL

}  // namespace icecache::wire
