// Data-plane messages. Input: two bytes (little endian) of meta length in words, meta, body. What a
// decoder accepts must stay inside the body it was given and inside the limits.
#include <cstring>
#include <utility>

#include "common/limits.h"
#include "common/wire/data_codec.h"
#include "common/wire/extent_codec.h"
#include "common/wire/push_codec.h"
#include "common/wire/select_batch_codec.h"
#include "kernels/int8_rows.h"
#include "tests/fuzz/fuzz_target.h"

namespace icecache::fuzz {
namespace {

const ModelShape kShape{.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 16};

std::string Input(const OutMessage& m, const std::string& body) {
  const size_t words = (m.meta.size() + 7) / 8;
  std::string out = {static_cast<char>(words & 255), static_cast<char>(words >> 8)};
  out.append(reinterpret_cast<const char*>(m.meta.data()), m.meta.size());
  out.append(words * 8 - m.meta.size(), '\0');
  return out + body;
}

void Inside(std::span<const std::byte> part, const InMessage& m) {
  if (part.empty()) return;
  if (part.data() < m.body.data() || part.data() + part.size() > m.body.data() + m.body.size()) {
    Broken("decoded rows lie inside the received body");
  }
}

void CheckSelectReply(const InMessage& m) {
  const auto reply = wire::DecodeSelectReply(m, kShape);
  if (!reply.ok()) return;
  for (const auto& head : reply->heads) {
    if (head.head.value >= kShape.kv_heads) Broken("heads are inside the shape");
    for (const auto& page : head.pages) {
      if (page.fill > limits::kPageTokens || page.from > page.fill) Broken("rows fit a page");
      Inside(page.k_rows, m);
      Inside(page.v_rows, m);
      Inside(page.positions, m);
      Inside(page.coded, m);
      if (page.coded.empty()) continue;
      std::vector<std::byte> k(page.fill * kShape.row_bytes()), v(k.size());
      (void)DecodeInt8Rows(page.coded, kShape.dtype, page.fill, kShape.head_dim, k.data(),
                           v.data());
    }
  }
}

void CheckBuild(const InMessage& message) {
  const auto request = wire::DecodeBuildRequest(message, kShape);
  if (!request.ok()) return;
  for (const Packing& packing : request->layouts) {
    (void)CheckPacking(packing, static_cast<uint32_t>(packing.layout.tokens.size()));
  }
}

void CheckPutRows(const InMessage& m) {
  const auto put = wire::DecodePutRowsRequest(m, kShape);
  if (!put.ok()) return;
  for (size_t h = 0; h < put->slices.heads.size(); ++h) {
    Inside(put->k_rows(h, kShape), m);
    Inside(put->v_rows(h, kShape), m);
  }
}

void CheckSelect(const InMessage& m) {
  const auto select = wire::DecodeSelectRequest(m, kShape);
  if (!select.ok()) return;
  if (select->queries.size() != select->heads.size() * kShape.group() * kShape.head_dim) {
    Broken("queries are there for every head");
  }
  for (size_t h = 0; select->append_count > 0 && h < select->heads.size(); ++h) {
    Inside(select->append_k(h, kShape), m);
    Inside(select->append_v(h, kShape), m);
  }
}

void CheckBatch(const InMessage& m) {
  const auto parts = wire::SplitSelects(m);
  if (!parts.ok()) return;
  if (parts->size() > limits::kSelectsPerBatchMax) Broken("batches are bounded");
  for (const InMessage& part : *parts) {
    Inside(part.body, m);
    if (part.meta.data() != nullptr &&
        (part.meta.data() < m.meta.data() ||
         part.meta.data() + part.meta.size() > m.meta.data() + m.meta.size())) {
      Broken("metas of a batch lie inside its meta");
    }
    CheckSelect(part);
  }
}

// The message as a transport delivers it: meta aligned, body of its own, so that a sanitizer sees
// their ends.
template <typename Decode>
std::function<void(const std::string&)> Delivered(uint16_t kind, Decode decode) {
  return [kind, decode](const std::string& input) {
    if (input.size() < 2) return;
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(input[i]); };
    const size_t meta_bytes =
        std::min<size_t>((byte(0) | size_t{byte(1)} << 8) * 8, input.size() - 2);
    std::vector<uint64_t> meta((meta_bytes + 7) / 8);
    if (meta_bytes > 0) std::memcpy(meta.data(), input.data() + 2, meta_bytes);
    const std::vector<char> body(input.begin() + static_cast<ptrdiff_t>(2 + meta_bytes),
                                 input.end());
    InMessage m{.kind = kind, .id = 1};
    m.meta = std::as_bytes(std::span(meta)).first(meta_bytes);
    m.body = std::as_bytes(std::span(body));
    (void)wire::PeekContext(m);
    decode(m);
  };
}

template <typename Message>
std::string Seed(const Message& message, size_t body_bytes) {
  OutMessage out;
  wire::Encode(message, &out);
  return Input(out, std::string(body_bytes, '\1'));
}

struct SelectSeeds {
  std::vector<std::string> requests, replies, batches;
};

SelectSeeds MakeSelectSeeds() {
  const size_t row = kShape.row_bytes();
  SelectSeeds seeds;
  wire::SelectRequest select{.context = ContextId(1),
                             .epoch = Epoch(2),
                             .layer = LayerId(1),
                             .max_pages = 12,
                             .read_cap = 1024,
                             .append_first = 40,
                             .append_count = 1};
  select.heads.push_back({KvHeadId(0), {{SegmentId(3), PageId(4), 1, 16}}, {0.5f, 0.25f}});
  seeds.requests.push_back(Seed(select, 2 * 16 * 4 + 2 * row));
  wire::SelectReply reply{.select_ns = 1, .gather_ns = 2, .next_position = 41};
  reply.heads.push_back({KvHeadId(0),
                         {{SegmentId(3), PageId(4), 1, 16, 0, -1.0f, 77}},
                         std::vector<float>(2 * 18),
                         0.9f,
                         160});
  seeds.replies.push_back(Seed(reply, 16 * (2 * row + 4)));
  select.heads[0].near = {17, 4, 39};
  select.flags = wire::kSelectInt8;
  seeds.requests.push_back(Seed(select, 2 * 16 * 4 + 2 * row));
  reply.heads[0].pages[0].coded_bytes = 600;
  seeds.replies.push_back(Seed(reply, 600 + 16 * 4));
  reply.heads[0].pages[0].place = wire::PagePlace::kPushed;
  reply.heads[0].pages[0].offset = 4096;
  seeds.replies.push_back(Seed(reply, 16 * 4));
  select.push_offset = 8192;
  select.push_bytes = 65536;
  seeds.requests.push_back(Seed(select, 2 * 16 * 4 + 2 * row));
  OutMessage one;
  wire::Encode(select, &one);
  const std::vector<std::byte> body(2 * 16 * 4 + 2 * row, std::byte{1});
  one.body.emplace_back(body);
  std::vector<OutMessage> two = {one, one};
  seeds.batches.push_back(Input(wire::JoinSelects(two), std::string(2 * body.size(), '\1')));
  return seeds;
}

// How memory of one side is named to the other.
std::vector<Target> MemoryTargets() {
  return {
      {"extent_keys",
       {Seed(wire::ExtentKeysRequest{ContextId(1), Epoch(2), {7, 8}}, 0)},
       Delivered(wire::kExtentKeys,
                 [](const InMessage& m) { (void)wire::DecodeExtentKeysRequest(m); })},
      {"extent_keys_reply",
       {Seed(wire::ExtentKeysReply{{7}, {std::vector<std::byte>(60)}}, 0)},
       Delivered(wire::kExtentKeys,
                 [](const InMessage& m) { (void)wire::DecodeExtentKeysReply(m); })},
      {"offer_memory",
       {Seed(wire::OfferMemoryRequest{std::vector<std::byte>(16), std::vector<std::byte>(140)}, 0)},
       Delivered(wire::kOfferMemory,
                 [](const InMessage& m) { (void)wire::DecodeOfferMemoryRequest(m); })},
      {"offer_memory_reply",
       {Seed(wire::OfferMemoryReply{}, 0)},
       Delivered(wire::kOfferMemory,
                 [](const InMessage& m) { (void)wire::DecodeOfferMemoryReply(m); })},
  };
}

}  // namespace

std::vector<Target> Targets() {
  const wire::SliceSet slices{ContextId(1), Epoch(2), LayerId(1), {KvHeadId(0), KvHeadId(1)}};
  const size_t row = kShape.row_bytes();
  const SelectSeeds select = MakeSelectSeeds();
  Packing packing;
  packing.layout = {{2, 0, 1, 4, 3}, {0, 3, 5}};
  packing.super_begin = {0, 2};
  const std::vector<Packing> layouts(slices.heads.size(), packing);
  OutMessage refusal;
  wire::EncodeStatus(Unavailable("draining"), &refusal);
  std::vector<Target> targets = {
      {"attach",
       {Seed(wire::AttachRequest{.ticket = std::vector<std::byte>(32)}, 0)},
       Delivered(wire::kAttach, [](const InMessage& m) { (void)wire::DecodeAttachRequest(m); })},
      {"attach_reply",
       {Seed(wire::AttachReply{.shard_count = 2}, 0)},
       Delivered(wire::kAttach, [](const InMessage& m) { (void)wire::DecodeAttachReply(m); })},
      {"put_rows",
       {Seed(wire::PutRowsRequest{.slices = slices, .first_position = 32, .token_count = 3},
             2 * 2 * 3 * row)},
       Delivered(wire::kPutRows, CheckPutRows)},
      {"put_rows_reply",
       {Seed(wire::PutRowsReply{.next_position = 35}, 0)},
       Delivered(wire::kPutRows, [](const InMessage& m) { (void)wire::DecodePutRowsReply(m); })},
      {"build",
       {Seed(wire::BuildRequest{.slices = slices, .token_count = 40}, 0),
        Seed(wire::BuildRequest{.slices = slices, .token_count = 40, .layouts = layouts}, 0)},
       Delivered(wire::kBuild, CheckBuild)},
      {"build_reply",
       {Seed(wire::BuildReply{.pages = 3}, 0)},
       Delivered(wire::kBuild, [](const InMessage& m) { (void)wire::DecodeBuildReply(m); })},
      {"select", select.requests, Delivered(wire::kSelect, CheckSelect)},
      {"select_reply", select.replies, Delivered(wire::kSelect, CheckSelectReply)},
      {"select_batch", select.batches, Delivered(wire::kSelectBatch, CheckBatch)},
      {"fetch_rows",
       {Seed(wire::FetchRowsRequest{.slices = slices, .part = wire::RowsPart::kTail}, 0)},
       Delivered(wire::kFetchRows,
                 [](const InMessage& m) { (void)wire::DecodeFetchRowsRequest(m, kShape); })},
      {"fetch_rows_reply",
       {Seed(wire::FetchRowsReply{.first_position = 24, .count = 2, .checksum = 9},
             2 * 2 * 2 * row)},
       Delivered(wire::kFetchRows,
                 [](const InMessage& m) { (void)wire::DecodeFetchRowsReply(m, kShape, 2); })},
      {"fetch_pages",
       {Seed(
           wire::FetchPagesRequest{
               ContextId(1), Epoch(2), LayerId(0), KvHeadId(1), {{SegmentId(3), PageId(4), 1, 16}}},
           0)},
       Delivered(wire::kFetchPages,
                 [](const InMessage& m) { (void)wire::DecodeFetchPagesRequest(m, kShape); })},
      {"status",
       {Input(refusal, "")},
       Delivered(0,
                 [](const InMessage& m) {
                   if (wire::DecodeStatus(m).ok()) Broken("an error status is never OK");
                 })},
  };
  for (Target& target : MemoryTargets()) targets.push_back(std::move(target));
  return targets;
}

}  // namespace icecache::fuzz
