// Data-plane messages. Input: one byte for the kind, two bytes (little endian) of meta length in
// words, meta, body. What a decoder accepts must stay inside the body it was given and inside the
// limits.
#include <cstring>

#include "common/limits.h"
#include "common/wire/data_codec.h"
#include "common/wire/select_batch_codec.h"
#include "kernels/int8_rows.h"
#include "tests/fuzz/fuzz_target.h"

namespace icecache::fuzz {
namespace {

const ModelShape kShape{.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 16};

std::string Input(uint8_t decoder, const OutMessage& m, const std::string& body) {
  const size_t words = (m.meta.size() + 7) / 8;
  std::string out = {static_cast<char>(decoder), static_cast<char>(words & 255),
                     static_cast<char>(words >> 8)};
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

void CheckRequests(const InMessage& m, int decoder) {
  if (decoder == 2) {
    const auto put = wire::DecodePutRowsRequest(m, kShape);
    if (!put.ok()) return;
    for (size_t h = 0; h < put->slices.heads.size(); ++h) {
      Inside(put->k_rows(h, kShape), m);
      Inside(put->v_rows(h, kShape), m);
    }
  } else if (decoder == 4) {
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
    CheckRequests(part, 4);
  }
}

}  // namespace

std::vector<std::string> Seeds() {
  const wire::SliceSet slices{ContextId(1), Epoch(2), LayerId(1), {KvHeadId(0), KvHeadId(1)}};
  const size_t row = kShape.row_bytes();
  std::vector<std::string> seeds;
  OutMessage select_message;
  const auto add = [&](uint8_t decoder, const auto& message, size_t body_bytes) {
    OutMessage out;
    wire::Encode(message, &out);
    seeds.push_back(Input(decoder, out, std::string(body_bytes, '\1')));
  };
  add(0, wire::AttachRequest{.ticket = std::vector<std::byte>(32)}, 0);
  add(1, wire::AttachReply{.shard_count = 2}, 0);
  add(2, wire::PutRowsRequest{.slices = slices, .first_position = 32, .token_count = 3},
      2 * 2 * 3 * row);
  add(3, wire::BuildRequest{.slices = slices, .token_count = 40}, 0);
  wire::SelectRequest select{.context = ContextId(1),
                             .epoch = Epoch(2),
                             .layer = LayerId(1),
                             .max_pages = 12,
                             .read_cap = 1024,
                             .append_first = 40,
                             .append_count = 1};
  select.heads.push_back({KvHeadId(0), {{SegmentId(3), PageId(4), 1, 16}}, {0.5f, 0.25f}});
  add(4, select, 2 * 16 * 4 + 2 * row);
  wire::SelectReply reply{.select_ns = 1, .gather_ns = 2, .next_position = 41};
  reply.heads.push_back({KvHeadId(0),
                         {{SegmentId(3), PageId(4), 1, 16, 0, -1.0f, 77}},
                         std::vector<float>(2 * 18),
                         0.9f,
                         160});
  add(5, reply, 16 * (2 * row + 4));
  select.heads[0].near = {17, 4, 39};
  select.flags = wire::kSelectInt8;
  add(4, select, 2 * 16 * 4 + 2 * row);
  reply.heads[0].pages[0].coded_bytes = 600;
  add(5, reply, 600 + 16 * 4);
  add(6, wire::FetchRowsRequest{.slices = slices, .part = wire::RowsPart::kTail}, 0);
  add(7, wire::FetchRowsReply{.first_position = 24, .count = 2, .checksum = 9}, 2 * 2 * 2 * row);
  add(8,
      wire::FetchPagesRequest{
          ContextId(1), Epoch(2), LayerId(0), KvHeadId(1), {{SegmentId(3), PageId(4), 1, 16}}},
      0);
  wire::Encode(select, &select_message);
  std::vector<OutMessage> selects = {select_message, select_message};
  const std::vector<std::byte> body(2 * 16 * 4 + 2 * row, std::byte{1});
  for (OutMessage& one : selects) one.body.emplace_back(body);
  seeds.push_back(Input(10, wire::JoinSelects(selects), std::string(2 * body.size(), '\1')));
  OutMessage status;
  wire::EncodeStatus(Unavailable("draining"), &status);
  seeds.push_back(Input(9, status, ""));
  return seeds;
}

}  // namespace icecache::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace icecache;
  if (size < 3) return 0;
  const int decoder = data[0] % 11;  // see kKinds
  const size_t meta_bytes = std::min<size_t>((data[1] | size_t{data[2]} << 8) * 8, size - 3);
  std::vector<uint64_t> meta((meta_bytes + 7) / 8);  // aligned, as the transport delivers it
  if (meta_bytes > 0) std::memcpy(meta.data(), data + 3, meta_bytes);
  const std::vector<uint8_t> body(data + 3 + meta_bytes,
                                  data + size);  // of its own, so that a sanitizer sees its end
  constexpr uint16_t kKinds[] = {wire::kAttach,   wire::kAttach,    wire::kPutRows,
                                 wire::kBuild,    wire::kSelect,    wire::kSelect,
                                 wire::kFetchRows, wire::kFetchRows, wire::kFetchPages,
                                 0,               wire::kSelectBatch};
  InMessage m{.kind = kKinds[decoder], .id = 1};
  m.meta = std::as_bytes(std::span(meta)).first(meta_bytes);
  m.body = std::as_bytes(std::span(body));
  (void)wire::PeekContext(m);
  switch (decoder) {
    case 0:
      (void)wire::DecodeAttachRequest(m);
      break;
    case 1:
      (void)wire::DecodeAttachReply(m);
      break;
    case 3:
      (void)wire::DecodeBuildRequest(m, fuzz::kShape);
      break;
    case 5:
      fuzz::CheckSelectReply(m);
      break;
    case 6:
      (void)wire::DecodeFetchRowsRequest(m, fuzz::kShape);
      break;
    case 7:
      (void)wire::DecodeFetchRowsReply(m, fuzz::kShape, 2);
      break;
    case 8:
      (void)wire::DecodeFetchPagesRequest(m, fuzz::kShape);
      break;
    case 10:
      fuzz::CheckBatch(m);
      break;
    case 9:
      if (wire::DecodeStatus(m).ok()) fuzz::Broken("an error status is never OK");
      break;
    default:
      fuzz::CheckRequests(m, decoder);
  }
  return 0;
}
