// Replies of the data plane and errors. Requests: data_codec.cc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/limits.h"
#include "common/wire/capnp_message.h"
#include "common/wire/data_codec.h"
#include "common/wire/message_checks.h"
#include "wire/data.capnp.h"

namespace icecache::wire {
namespace {

constexpr uint32_t kRowsMax = std::max(limits::kSinkTokensMax, limits::kWindowTokensMax);

// Hands out consecutive parts of a body; never more than there is.
class BodyReader {
 public:
  BodyReader(const MessageChecks& check, std::span<const std::byte> body)
      : check_(check), body_(body) {}

  Status Take(size_t bytes, std::span<const std::byte>* part) {
    if (bytes > body_.size() - at_) {
      return check_.Bad("body", std::to_string(body_.size()) + " bytes",
                        "at least " + std::to_string(at_ + bytes));
    }
    *part = body_.subspan(at_, bytes);
    at_ += bytes;
    return OkStatus();
  }
  Status CheckEnd() const { return check_.BodyBytes(body_.size(), at_); }

 private:
  const MessageChecks& check_;
  std::span<const std::byte> body_;
  size_t at_ = 0;
};

}  // namespace

void Encode(const AttachReply& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::AttachReply>();
  root.setProtocolVersion(in.protocol_version);
  root.setShard(in.shard.value);
  root.setShardCount(in.shard_count);
  root.setExtents(Chars(in.extents));
  root.setPushes(in.pushes);
  out->kind = kAttach;
  out->meta = FlatBytes(message);
}

void Encode(const PutRowsReply& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  message.initRoot<schema::PutRowsReply>().setNextPosition(in.next_position);
  out->kind = kPutRows;
  out->meta = FlatBytes(message);
}

void Encode(const BuildReply& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  message.initRoot<schema::BuildReply>().setPages(in.pages);
  out->kind = kBuild;
  out->meta = FlatBytes(message);
}

void Encode(const FetchRowsReply& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::FetchRowsReply>();
  root.setFirstPosition(in.first_position);
  root.setCount(in.count);
  root.setChecksum(in.checksum);
  out->kind = kFetchRows;
  out->meta = FlatBytes(message);
}

namespace {

void WriteHead(const HeadSelection& in, schema::HeadSelection::Builder out) {
  out.setKvHead(in.head.value);
  auto pages = out.initPages(static_cast<unsigned>(in.pages.size()));
  for (unsigned i = 0; i < pages.size(); ++i) {
    const PagePayload& from = in.pages[i];
    auto page = pages[i];
    page.setSegment(from.segment.value);
    page.setPage(from.page.value);
    page.setVersion(from.version);
    page.setFill(from.fill);
    page.setFrom(from.from);
    page.setLogMass(from.log_mass);
    page.setChecksum(from.checksum);
    page.setPlace(static_cast<uint8_t>(from.place));
    page.setCodedBytes(from.coded_bytes);
    page.setCodedChecksum(from.coded_checksum);
    const bool mapped = from.place == PagePlace::kMapped;
    if (mapped || from.place == PagePlace::kPushed) page.setOffset(from.offset);
    if (mapped) page.setExtent(from.extent);
  }
  out.setResidual(Bytes(std::as_bytes(std::span<const float>(in.residual))));
  out.setCoveredMass(in.covered_mass);
  out.setTokensRead(in.tokens_read);
}

}  // namespace

void Encode(const SelectReply& in, OutMessage* out) {
  size_t words = 32;
  for (const HeadSelection& head : in.heads) {
    words += 16 + 9 * head.pages.size() + head.residual.size() / 2;
  }
  capnp::MallocMessageBuilder message(
      static_cast<unsigned>(words));  // one segment, no far pointers
  auto root = message.initRoot<schema::SelectReply>();
  auto heads = root.initHeads(static_cast<unsigned>(in.heads.size()));
  for (unsigned i = 0; i < heads.size(); ++i) WriteHead(in.heads[i], heads[i]);
  root.setSelectNanos(in.select_ns);
  root.setGatherNanos(in.gather_ns);
  root.setNextPosition(in.next_position);
  out->kind = kSelect;
  out->meta = FlatBytes(message);
}

Result<AttachReply> DecodeAttachReply(const InMessage& message) {
  const MessageChecks check("AttachReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kAttach));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::AttachReply>(
      check.message(), message.meta, [&](schema::AttachReply::Reader root) -> Result<AttachReply> {
        AttachReply out;
        out.protocol_version = root.getProtocolVersion();
        out.shard = ShardId(root.getShard());
        out.shard_count = root.getShardCount();
        KV_RETURN_IF_ERROR(check.Between("shardCount", out.shard_count, 1, limits::kShardsMax));
        KV_RETURN_IF_ERROR(check.AtMost("shard", out.shard.value, out.shard_count - 1u));
        const std::string_view extents = View(root.getExtents());
        KV_RETURN_IF_ERROR(
            check.AtMost("extents.size", extents.size(), limits::kExtentSocketNameBytesMax));
        out.extents = extents;
        out.pushes = root.getPushes();
        return out;
      });
}

Result<PutRowsReply> DecodePutRowsReply(const InMessage& message) {
  const MessageChecks check("PutRowsReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kPutRows));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::PutRowsReply>(
      check.message(), message.meta,
      [&](schema::PutRowsReply::Reader root) -> Result<PutRowsReply> {
        const PutRowsReply out{root.getNextPosition()};
        KV_RETURN_IF_ERROR(
            check.AtMost("nextPosition", out.next_position, limits::kContextTokensMax));
        return out;
      });
}

Result<BuildReply> DecodeBuildReply(const InMessage& message) {
  const MessageChecks check("BuildReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kBuild));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::BuildReply>(
      check.message(), message.meta, [&](schema::BuildReply::Reader root) -> Result<BuildReply> {
        const BuildReply out{root.getPages()};
        KV_RETURN_IF_ERROR(check.AtMost("pages", out.pages,
                                        uint64_t{limits::kContextTokensMax} * limits::kKvHeadsMax));
        return out;
      });
}

namespace {

Status ReadPage(const MessageChecks& check, schema::PagePayload::Reader in, const ModelShape& shape,
                BodyReader* body, PagePayload* out) {
  out->segment = SegmentId(in.getSegment());
  out->page = PageId(in.getPage());
  out->version = in.getVersion();
  out->fill = in.getFill();
  out->from = in.getFrom();
  out->log_mass = in.getLogMass();
  out->checksum = in.getChecksum();
  KV_RETURN_IF_ERROR(check.Between("page.fill", out->fill, 1, limits::kPageTokens));
  KV_RETURN_IF_ERROR(check.AtMost("page.from", out->from, out->fill));
  if (std::isnan(out->log_mass)) return check.Bad("page.logMass", "nan", "a number");
  KV_RETURN_IF_ERROR(
      check.AtMost("page.place", in.getPlace(), static_cast<uint8_t>(PagePlace::kPushed)));
  out->place = static_cast<PagePlace>(in.getPlace());
  if (out->place == PagePlace::kAttended) {
    return check.Between("page.from", out->from, out->fill, out->fill);
  }
  if (out->place == PagePlace::kMapped) {
    out->offset = in.getOffset();
    out->extent = in.getExtent();
    return check.AtMost("page.offset", out->offset, limits::kExtentBytes - shape.page_bytes());
  }
  const size_t rows = size_t{out->fill} - out->from;
  if (out->place == PagePlace::kPushed) {
    out->offset = in.getOffset();
    KV_RETURN_IF_ERROR(check.AtMost("page.offset", out->offset,
                                    limits::kPushBytes - 2 * rows * shape.row_bytes()));
    return body->Take(rows * sizeof(uint32_t), &out->positions);
  }
  out->coded_bytes = in.getCodedBytes();
  out->coded_checksum = in.getCodedChecksum();
  if (out->coded_bytes > 0) {
    KV_RETURN_IF_ERROR(check.AtMost("page.from", out->from, 0));
    KV_RETURN_IF_ERROR(
        check.AtMost("page.codedBytes", out->coded_bytes, 2 * rows * shape.row_bytes() - 1));
    KV_RETURN_IF_ERROR(body->Take(out->coded_bytes, &out->coded));
    return body->Take(rows * sizeof(uint32_t), &out->positions);
  }
  KV_RETURN_IF_ERROR(body->Take(rows * shape.row_bytes(), &out->k_rows));
  KV_RETURN_IF_ERROR(body->Take(rows * shape.row_bytes(), &out->v_rows));
  return body->Take(rows * sizeof(uint32_t), &out->positions);
}

// The flat layout of AttentionStates: max[group], denom[group], out[group, head_dim]. An empty
// state has max -inf.
Status ReadResidual(const MessageChecks& check, std::span<const std::byte> bytes,
                    const ModelShape& shape, std::vector<float>* out) {
  if (bytes.empty()) return OkStatus();
  const size_t group = shape.group();
  const size_t expected = group * (size_t{shape.head_dim} + 2) * sizeof(float);
  KV_RETURN_IF_ERROR(check.Between("residual.size", bytes.size(), expected, expected));
  out->resize(expected / sizeof(float));
  std::memcpy(out->data(), bytes.data(), bytes.size());
  const std::span<const float> states(*out);
  for (size_t i = 0; i < group; ++i) {
    const float max = states[i], denom = states[group + i];
    if (std::isnan(max) || max == INFINITY) {
      return check.Bad("residual.max", std::to_string(max), "a number or -inf");
    }
    KV_RETURN_IF_ERROR(
        check.InRange("residual.denom", denom, 0, std::numeric_limits<float>::max()));
  }
  return check.Finite("residual.out", states.subspan(2 * group));
}

Status ReadHead(const MessageChecks& check, schema::HeadSelection::Reader in, int last,
                const ModelShape& shape, BodyReader* body, HeadSelection* out) {
  out->head = KvHeadId(in.getKvHead());
  KV_RETURN_IF_ERROR(check.AtMost("kvHead", out->head.value, shape.kv_heads - 1));
  if (int{out->head.value} <= last) {
    return check.Bad("kvHead", std::to_string(out->head.value),
                     "more than " + std::to_string(last));
  }
  const auto pages = in.getPages();
  KV_RETURN_IF_ERROR(check.AtMost("pages.size", pages.size(), limits::kPagesPerSelectMax));
  out->pages.reserve(pages.size());
  for (const auto& page : pages) {
    KV_RETURN_IF_ERROR(ReadPage(check, page, shape, body, &out->pages.emplace_back()));
  }
  KV_RETURN_IF_ERROR(ReadResidual(check, View(in.getResidual()), shape, &out->residual));
  out->covered_mass = in.getCoveredMass();
  out->tokens_read = in.getTokensRead();
  KV_RETURN_IF_ERROR(check.Finite("coveredMass", {&out->covered_mass, 1}));
  return check.AtMost("tokensRead", out->tokens_read, limits::kContextTokensMax);
}

}  // namespace

Result<SelectReply> DecodeSelectReply(const InMessage& message, const ModelShape& shape) {
  const MessageChecks check("SelectReply");
  if (message.kind != kFetchPages) KV_RETURN_IF_ERROR(check.Kind(message.kind, kSelect));
  return ReadFlat<schema::SelectReply>(
      check.message(), message.meta, [&](schema::SelectReply::Reader root) -> Result<SelectReply> {
        SelectReply out;
        const auto heads = root.getHeads();
        KV_RETURN_IF_ERROR(check.Between("heads.size", heads.size(), 1, shape.kv_heads));
        BodyReader body(check, message.body);
        out.heads.reserve(heads.size());
        int last = -1;
        for (const auto& head : heads) {
          HeadSelection& read = out.heads.emplace_back();
          KV_RETURN_IF_ERROR(ReadHead(check, head, last, shape, &body, &read));
          last = read.head.value;
        }
        KV_RETURN_IF_ERROR(body.CheckEnd());
        out.select_ns = root.getSelectNanos();
        out.gather_ns = root.getGatherNanos();
        out.next_position = root.getNextPosition();
        KV_RETURN_IF_ERROR(
            check.AtMost("nextPosition", out.next_position, limits::kContextTokensMax));
        return out;
      });
}

Result<FetchRowsReply> DecodeFetchRowsReply(const InMessage& message, const ModelShape& shape,
                                            size_t head_count) {
  const MessageChecks check("FetchRowsReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kFetchRows));
  return ReadFlat<schema::FetchRowsReply>(
      check.message(), message.meta,
      [&](schema::FetchRowsReply::Reader root) -> Result<FetchRowsReply> {
        FetchRowsReply out;
        out.first_position = root.getFirstPosition();
        out.count = root.getCount();
        out.checksum = root.getChecksum();
        KV_RETURN_IF_ERROR(check.AtMost("count", out.count, kRowsMax));
        KV_RETURN_IF_ERROR(check.Positions("firstPosition + count", out.first_position, out.count));
        KV_RETURN_IF_ERROR(
            check.BodyBytes(message.body.size(), head_count * 2 * out.count * shape.row_bytes()));
        out.body = message.body;
        return out;
      });
}

void EncodeStatus(const Status& status, OutMessage* out) {
  KV_CHECK(!status.ok());
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::Status>();
  root.setCode(static_cast<uint8_t>(status.code()));
  root.setMessage(Chars(status.message().substr(0, limits::kStatusTextBytesMax)));
  out->meta = FlatBytes(message);
}

Status DecodeStatus(const InMessage& message) {
  Status peer;
  const Status read =
      ReadFlat<schema::Status>("Status", message.meta, [&](schema::Status::Reader root) -> Status {
        const MessageChecks check("Status");
        const uint8_t code = root.getCode();
        const std::string_view text = View(root.getMessage());
        KV_RETURN_IF_ERROR(
            check.Between("code", code, 1, static_cast<uint8_t>(StatusCode::kInternal)));
        KV_RETURN_IF_ERROR(check.AtMost("message.size", text.size(), limits::kStatusTextBytesMax));
        peer = Status(static_cast<StatusCode>(code), std::string(text));
        return OkStatus();
      });
  return read.ok() ? peer : Internal("the peer's error is unreadable: " + read.message());
}

}  // namespace icecache::wire
