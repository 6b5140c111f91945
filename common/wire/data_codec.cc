// Requests of the data plane. Replies: data_reply_codec.cc.
#include "common/wire/data_codec.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "common/limits.h"
#include "common/wire/capnp_message.h"
#include "common/wire/message_checks.h"
#include "wire/data.capnp.h"

namespace icecache::wire {
namespace {

constexpr uint8_t kRankMax = 2;  // the last GroupRank

std::span<const std::byte> RowBlock(std::span<const std::byte> body, size_t block, size_t bytes) {
  KV_CHECK((block + 1) * bytes <= body.size());
  return body.subspan(block * bytes, bytes);
}

std::vector<float> Floats(std::span<const std::byte> bytes) {
  std::vector<float> out(bytes.size() / sizeof(float));
  if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size() * sizeof(float));
  return out;
}

// Differences of neighbours, each in a byte: sizes of pages, and of groups of pages.
void AppendSizes(const std::vector<uint32_t>& begin, std::vector<std::byte>* to) {
  for (size_t i = 0; i + 1 < begin.size(); ++i) {
    to->push_back(static_cast<std::byte>(begin[i + 1] - begin[i]));
  }
}

void AppendLayout(const Packing& packing, std::vector<std::byte>* to) {
  const auto tokens = std::as_bytes(std::span(packing.layout.tokens));
  to->insert(to->end(), tokens.begin(), tokens.end());
  AppendSizes(packing.layout.page_begin, to);
  AppendSizes(packing.super_begin, to);
}

size_t LayoutBytes(schema::BuildLayout::Reader layout) {
  return size_t{layout.getTokens()} * sizeof(uint32_t) + layout.getPages() + layout.getGroups();
}

// The bytes are there; what they say is the receiver's to check.
Packing ReadLayout(schema::BuildLayout::Reader from, std::span<const std::byte> body) {
  Packing packing;
  const size_t token_bytes = size_t{from.getTokens()} * sizeof(uint32_t);
  packing.layout.tokens.resize(from.getTokens());
  if (token_bytes > 0) std::memcpy(packing.layout.tokens.data(), body.data(), token_bytes);
  const auto read_sizes = [&](size_t first, uint32_t count, std::vector<uint32_t>* begin) {
    begin->push_back(0);
    for (uint32_t i = 0; i < count; ++i) {
      begin->push_back(begin->back() + static_cast<uint8_t>(body[first + i]));
    }
  };
  read_sizes(token_bytes, from.getPages(), &packing.layout.page_begin);
  read_sizes(token_bytes + from.getPages(), from.getGroups(), &packing.super_begin);
  return packing;
}

template <typename Builder>
void WriteSlices(const SliceSet& slices, Builder root) {
  root.setContext(slices.context.value);
  root.setEpoch(slices.epoch.value);
  root.setLayer(slices.layer.value);
  auto heads = root.initKvHeads(static_cast<unsigned>(slices.heads.size()));
  for (unsigned i = 0; i < heads.size(); ++i) heads.set(i, slices.heads[i].value);
}

// `last`: the head before this one, -1 for the first.
Status CheckHead(const MessageChecks& check, uint16_t head, int last, const ModelShape& shape) {
  KV_RETURN_IF_ERROR(check.AtMost("kvHead", head, shape.kv_heads - 1));
  if (int{head} > last) return OkStatus();
  return check.Bad("kvHead", std::to_string(head), "more than " + std::to_string(last));
}

template <typename Reader>
Result<SliceSet> ReadSlices(const MessageChecks& check, const Reader& root,
                            const ModelShape& shape) {
  SliceSet slices;
  slices.context = ContextId(root.getContext());
  slices.epoch = Epoch(root.getEpoch());
  slices.layer = LayerId(root.getLayer());
  KV_RETURN_IF_ERROR(check.AtMost("layer", slices.layer.value, shape.layers - 1));
  const auto heads = root.getKvHeads();
  KV_RETURN_IF_ERROR(check.Between("kvHeads.size", heads.size(), 1, shape.kv_heads));
  slices.heads.reserve(heads.size());
  int last = -1;
  for (const uint16_t head : heads) {
    KV_RETURN_IF_ERROR(CheckHead(check, head, last, shape));
    slices.heads.emplace_back(head);
    last = head;
  }
  return slices;
}

template <typename List>
void WriteResident(const std::vector<ResidentPage>& pages, List list) {
  for (unsigned i = 0; i < list.size(); ++i) {
    auto page = list[i];
    page.setSegment(pages[i].segment.value);
    page.setPage(pages[i].page.value);
    page.setVersion(pages[i].version);
    page.setFill(pages[i].fill);
  }
}

template <typename List>
Result<std::vector<ResidentPage>> ReadResident(const MessageChecks& check, const List& list) {
  KV_RETURN_IF_ERROR(check.AtMost("pages.size", list.size(), limits::kPagesPerSelectMax));
  std::vector<ResidentPage> pages;
  pages.reserve(list.size());
  for (const auto& page : list) {
    KV_RETURN_IF_ERROR(check.AtMost("page.fill", page.getFill(), limits::kPageTokens));
    pages.push_back(
        {SegmentId(page.getSegment()), PageId(page.getPage()), page.getVersion(), page.getFill()});
  }
  return pages;
}

template <typename Root>
ContextId ContextOf(typename Root::Reader root) {
  return ContextId(root.getContext());
}

}  // namespace

std::span<const std::byte> PutRowsRequest::k_rows(size_t head_index,
                                                  const ModelShape& shape) const {
  return RowBlock(body, 2 * head_index, token_count * shape.row_bytes());
}
std::span<const std::byte> PutRowsRequest::v_rows(size_t head_index,
                                                  const ModelShape& shape) const {
  return RowBlock(body, 2 * head_index + 1, token_count * shape.row_bytes());
}
std::span<const std::byte> SelectRequest::append_k(size_t head_index,
                                                   const ModelShape& shape) const {
  return RowBlock(append_body, 2 * head_index, append_count * shape.row_bytes());
}
std::span<const std::byte> SelectRequest::append_v(size_t head_index,
                                                   const ModelShape& shape) const {
  return RowBlock(append_body, 2 * head_index + 1, append_count * shape.row_bytes());
}

void Encode(const AttachRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::AttachRequest>();
  root.setProtocolVersion(in.protocol_version);
  root.setTicket(Bytes(in.ticket));
  out->kind = kAttach;
  out->meta = FlatBytes(message);
}

void Encode(const PutRowsRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::PutRowsRequest>();
  WriteSlices(in.slices, root);
  root.setFirstPosition(in.first_position);
  root.setTokenCount(in.token_count);
  out->kind = kPutRows;
  out->meta = FlatBytes(message);
}

void Encode(const BuildRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::BuildRequest>();
  WriteSlices(in.slices, root);
  root.setTokenCount(in.token_count);
  struct Pinned {
    std::vector<std::byte> body;
    std::shared_ptr<const void> rest;  // what the caller has pinned before
  };
  auto pinned = std::make_shared<Pinned>();
  const auto energy = std::as_bytes(in.query_energy);
  pinned->body.assign(energy.begin(), energy.end());
  auto layouts = root.initLayouts(static_cast<unsigned>(in.layouts.size()));
  for (unsigned i = 0; i < layouts.size(); ++i) {
    layouts[i].setTokens(static_cast<uint32_t>(in.layouts[i].layout.tokens.size()));
    layouts[i].setPages(in.layouts[i].layout.page_count());
    layouts[i].setGroups(in.layouts[i].super_count());
    AppendLayout(in.layouts[i], &pinned->body);
  }
  out->kind = kBuild;
  out->meta = FlatBytes(message);
  if (pinned->body.empty()) return;
  pinned->rest = std::move(out->pin);
  out->body.push_back(pinned->body);
  out->pin = std::move(pinned);
}

void Encode(const SelectRequest& in, OutMessage* out) {
  size_t words = 64 + 8 * in.heads.size();
  for (const SelectHead& head : in.heads) {
    words += 4 + 3 * head.resident.size() + head.local_lse.size() + head.near.size();
  }
  capnp::MallocMessageBuilder message(
      static_cast<unsigned>(words));  // one segment, no far pointers
  auto root = message.initRoot<schema::SelectRequest>();
  root.setContext(in.context.value);
  root.setEpoch(in.epoch.value);
  root.setLayer(in.layer.value);
  auto heads = root.initHeads(static_cast<unsigned>(in.heads.size()));
  for (unsigned i = 0; i < heads.size(); ++i) {
    const SelectHead& from = in.heads[i];
    auto head = heads[i];
    head.setKvHead(from.head.value);
    WriteResident(from.resident, head.initResident(static_cast<unsigned>(from.resident.size())));
    auto lse = head.initLocalLse(static_cast<unsigned>(from.local_lse.size()));
    for (unsigned j = 0; j < lse.size(); ++j) lse.set(j, from.local_lse[j]);
    auto near = head.initNear(static_cast<unsigned>(from.near.size()));
    for (unsigned j = 0; j < near.size(); ++j) near.set(j, from.near[j]);
  }
  root.setMaxPages(in.max_pages);
  root.setReadCap(in.read_cap);
  root.setMinMass(in.min_mass);
  root.setRank(in.rank);
  root.setFlags(in.flags);
  root.setAppendFirst(in.append_first);
  root.setAppendCount(in.append_count);
  root.setPushOffset(in.push_offset);
  root.setPushBytes(in.push_bytes);
  out->kind = kSelect;
  out->meta = FlatBytes(message);
}

void Encode(const FetchRowsRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::FetchRowsRequest>();
  WriteSlices(in.slices, root);
  root.setPart(static_cast<schema::FetchRowsRequest::Part>(in.part));
  root.setFirstPosition(in.first_position);
  root.setTokenCount(in.token_count);
  out->kind = kFetchRows;
  out->meta = FlatBytes(message);
}

void Encode(const FetchPagesRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::FetchPagesRequest>();
  root.setContext(in.context.value);
  root.setEpoch(in.epoch.value);
  root.setLayer(in.layer.value);
  root.setKvHead(in.head.value);
  WriteResident(in.pages, root.initPages(static_cast<unsigned>(in.pages.size())));
  root.setFlags(in.flags);
  out->kind = kFetchPages;
  out->meta = FlatBytes(message);
}

Result<ContextId> PeekContext(const InMessage& message) {
  const auto peek = [&]<typename Root>(std::type_identity<Root>) {
    return ReadFlat<Root>("request", message.meta, [](typename Root::Reader root) {
      return Result<ContextId>(ContextOf<Root>(root));
    });
  };
  switch (message.kind) {
    case kPutRows:
      return peek(std::type_identity<schema::PutRowsRequest>());
    case kBuild:
      return peek(std::type_identity<schema::BuildRequest>());
    case kSelect:
      return peek(std::type_identity<schema::SelectRequest>());
    case kFetchRows:
      return peek(std::type_identity<schema::FetchRowsRequest>());
    case kFetchPages:
      return peek(std::type_identity<schema::FetchPagesRequest>());
    case kExtentKeys:
      return peek(std::type_identity<schema::ExtentKeysRequest>());
    default:
      return Unimplemented("request kind " + std::to_string(message.kind) +
                           " names no context; expected 2..6 or 8: does the peer speak protocol " +
                           std::to_string(kProtocolVersion) + "?");
  }
}

Result<AttachRequest> DecodeAttachRequest(const InMessage& message) {
  const MessageChecks check("AttachRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kAttach));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::AttachRequest>(
      check.message(), message.meta,
      [&](schema::AttachRequest::Reader root) -> Result<AttachRequest> {
        AttachRequest out;
        out.protocol_version = root.getProtocolVersion();
        const auto ticket = View(root.getTicket());
        KV_RETURN_IF_ERROR(check.Between("ticket.size", ticket.size(), 1, limits::kTicketBytesMax));
        out.ticket.assign(ticket.begin(), ticket.end());
        return out;
      });
}

Result<PutRowsRequest> DecodePutRowsRequest(const InMessage& message, const ModelShape& shape) {
  const MessageChecks check("PutRowsRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kPutRows));
  return ReadFlat<schema::PutRowsRequest>(
      check.message(), message.meta,
      [&](schema::PutRowsRequest::Reader root) -> Result<PutRowsRequest> {
        PutRowsRequest out;
        KV_ASSIGN_OR_RETURN(out.slices, ReadSlices(check, root, shape));
        out.first_position = root.getFirstPosition();
        out.token_count = root.getTokenCount();
        KV_RETURN_IF_ERROR(
            check.Between("tokenCount", out.token_count, 1, limits::kPutRowsTokensMax));
        KV_RETURN_IF_ERROR(
            check.Positions("firstPosition + tokenCount", out.first_position, out.token_count));
        KV_RETURN_IF_ERROR(
            check.BodyBytes(message.body.size(),
                            out.slices.heads.size() * 2 * out.token_count * shape.row_bytes()));
        out.body = message.body;
        return out;
      });
}

Result<BuildRequest> DecodeBuildRequest(const InMessage& message, const ModelShape& shape) {
  const MessageChecks check("BuildRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kBuild));
  return ReadFlat<schema::BuildRequest>(
      check.message(), message.meta,
      [&](schema::BuildRequest::Reader root) -> Result<BuildRequest> {
        BuildRequest out;
        KV_ASSIGN_OR_RETURN(out.slices, ReadSlices(check, root, shape));
        out.token_count = root.getTokenCount();
        KV_RETURN_IF_ERROR(check.AtMost("tokenCount", out.token_count, limits::kContextTokensMax));
        const auto layouts = root.getLayouts();
        const size_t heads = out.slices.heads.size();
        KV_RETURN_IF_ERROR(check.Between("layouts.size", layouts.size(),
                                         layouts.size() == 0 ? 0 : heads, heads));
        size_t layout_bytes = 0;
        for (const auto layout : layouts) {
          KV_RETURN_IF_ERROR(check.AtMost("layout.tokens", layout.getTokens(), out.token_count));
          KV_RETURN_IF_ERROR(check.AtMost("layout.pages", layout.getPages(), layout.getTokens()));
          KV_RETURN_IF_ERROR(check.AtMost("layout.groups", layout.getGroups(), layout.getPages()));
          layout_bytes += LayoutBytes(layout);
        }
        const size_t energy_bytes = heads * size_t{shape.head_dim} * sizeof(float);
        const bool energy = message.body.size() > layout_bytes;
        KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(),
                                           layout_bytes + (energy ? energy_bytes : 0)));
        out.decoded_query_energy = Floats(message.body.first(energy ? energy_bytes : 0));
        KV_RETURN_IF_ERROR(check.Finite("queryEnergy", out.decoded_query_energy));
        std::span<const std::byte> rest = message.body.subspan(energy ? energy_bytes : 0);
        for (const auto layout : layouts) {
          out.layouts.push_back(ReadLayout(layout, rest));
          rest = rest.subspan(LayoutBytes(layout));
        }
        return out;
      });
}

namespace {

Result<SelectHead> ReadSelectHead(const MessageChecks& check, schema::SelectHead::Reader in,
                                  int last, const ModelShape& shape) {
  SelectHead out;
  out.head = KvHeadId(in.getKvHead());
  KV_RETURN_IF_ERROR(CheckHead(check, out.head.value, last, shape));
  KV_ASSIGN_OR_RETURN(out.resident, ReadResident(check, in.getResident()));
  const auto near = in.getNear();
  KV_RETURN_IF_ERROR(check.AtMost("near.size", near.size(), limits::kNearPositionsMax));
  out.near.reserve(near.size());
  for (const uint32_t position : near) out.near.push_back(position);
  const auto lse = in.getLocalLse();
  if (lse.size() == 0) return out;
  KV_RETURN_IF_ERROR(check.Between("localLse.size", lse.size(), shape.group(), shape.group()));
  for (const float value : lse) {  // -inf: the worker holds nothing
    if (std::isnan(value) || value == INFINITY) {
      return check.Bad("localLse", std::to_string(value), "a number or -inf");
    }
    out.local_lse.push_back(value);
  }
  return out;
}

Status ReadSelectNumbers(const MessageChecks& check, schema::SelectRequest::Reader root,
                         SelectRequest* out) {
  out->max_pages = root.getMaxPages();
  out->read_cap = root.getReadCap();
  out->min_mass = root.getMinMass();
  out->rank = root.getRank();
  out->flags = root.getFlags();
  out->append_first = root.getAppendFirst();
  out->append_count = root.getAppendCount();
  out->push_offset = root.getPushOffset();
  out->push_bytes = root.getPushBytes();
  KV_RETURN_IF_ERROR(check.AtMost("maxPages", out->max_pages, limits::kPagesPerSelectMax));
  KV_RETURN_IF_ERROR(check.AtMost("readCap", out->read_cap, limits::kReadCapMax));
  KV_RETURN_IF_ERROR(check.InRange("minMass", out->min_mass, 0, 1));
  KV_RETURN_IF_ERROR(check.AtMost("rank", out->rank, kRankMax));
  KV_RETURN_IF_ERROR(
      check.AtMost("flags", out->flags,
                   kSelectNoResidual | kSelectMapped | kSelectAttend | kSelectInt8 | kSelectCheck));
  if ((out->flags & kSelectMapped) != 0 && (out->flags & kSelectAttend) != 0) {
    return check.Bad("flags", std::to_string(out->flags), "mapped or attend, not both");
  }
  KV_RETURN_IF_ERROR(check.AtMost("pushBytes", out->push_bytes, limits::kPushRegionBytesMax));
  KV_RETURN_IF_ERROR(
      check.AtMost("pushOffset", out->push_offset, limits::kPushBytes - out->push_bytes));
  KV_RETURN_IF_ERROR(check.AtMost("appendCount", out->append_count, limits::kPendingTokensMax));
  return check.Positions("appendFirst + appendCount", out->append_first, out->append_count);
}

}  // namespace

Result<SelectRequest> DecodeSelectRequest(const InMessage& message, const ModelShape& shape) {
  const MessageChecks check("SelectRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kSelect));
  return ReadFlat<schema::SelectRequest>(
      check.message(), message.meta,
      [&](schema::SelectRequest::Reader root) -> Result<SelectRequest> {
        SelectRequest out;
        out.context = ContextId(root.getContext());
        out.epoch = Epoch(root.getEpoch());
        out.layer = LayerId(root.getLayer());
        KV_RETURN_IF_ERROR(check.AtMost("layer", out.layer.value, shape.layers - 1));
        KV_RETURN_IF_ERROR(ReadSelectNumbers(check, root, &out));
        const auto heads = root.getHeads();
        KV_RETURN_IF_ERROR(check.Between("heads.size", heads.size(), 1, shape.kv_heads));
        int last = -1;
        for (const auto& head : heads) {
          KV_ASSIGN_OR_RETURN(SelectHead read, ReadSelectHead(check, head, last, shape));
          last = read.head.value;
          out.heads.push_back(std::move(read));
        }
        const size_t query_bytes =
            out.heads.size() * shape.group() * size_t{shape.head_dim} * sizeof(float);
        const size_t append_bytes = out.heads.size() * 2 * out.append_count * shape.row_bytes();
        KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), query_bytes + append_bytes));
        out.queries = Floats(message.body.first(query_bytes));
        KV_RETURN_IF_ERROR(check.Finite("queries", out.queries));
        out.append_body = message.body.subspan(query_bytes);
        return out;
      });
}

Result<FetchRowsRequest> DecodeFetchRowsRequest(const InMessage& message, const ModelShape& shape) {
  const MessageChecks check("FetchRowsRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kFetchRows));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::FetchRowsRequest>(
      check.message(), message.meta,
      [&](schema::FetchRowsRequest::Reader root) -> Result<FetchRowsRequest> {
        FetchRowsRequest out;
        KV_ASSIGN_OR_RETURN(out.slices, ReadSlices(check, root, shape));
        const auto part = static_cast<uint16_t>(root.getPart());
        KV_RETURN_IF_ERROR(check.AtMost("part", part, static_cast<uint16_t>(RowsPart::kRange)));
        out.part = static_cast<RowsPart>(part);
        out.first_position = root.getFirstPosition();
        out.token_count = root.getTokenCount();
        const uint32_t least = out.part == RowsPart::kRange ? 1 : 0;
        const uint32_t most = least * limits::kPutRowsTokensMax;
        KV_RETURN_IF_ERROR(check.Between("tokenCount", out.token_count, least, most));
        KV_RETURN_IF_ERROR(check.AtMost("firstPosition", out.first_position,
                                        least * limits::kContextTokensMax));
        return out;
      });
}

Result<FetchPagesRequest> DecodeFetchPagesRequest(const InMessage& message,
                                                  const ModelShape& shape) {
  const MessageChecks check("FetchPagesRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kFetchPages));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::FetchPagesRequest>(
      check.message(), message.meta,
      [&](schema::FetchPagesRequest::Reader root) -> Result<FetchPagesRequest> {
        FetchPagesRequest out;
        out.context = ContextId(root.getContext());
        out.epoch = Epoch(root.getEpoch());
        out.layer = LayerId(root.getLayer());
        out.head = KvHeadId(root.getKvHead());
        KV_RETURN_IF_ERROR(check.AtMost("layer", out.layer.value, shape.layers - 1));
        KV_RETURN_IF_ERROR(CheckHead(check, out.head.value, -1, shape));
        KV_ASSIGN_OR_RETURN(out.pages, ReadResident(check, root.getPages()));
        KV_RETURN_IF_ERROR(
            check.Between("pages.size", out.pages.size(), 1, limits::kPagesPerSelectMax));
        out.flags = root.getFlags();
        if (out.flags != 0 && out.flags != kSelectMapped) {
          return check.Bad("flags", std::to_string(out.flags), "mapped or none");
        }
        return out;
      });
}

}  // namespace icecache::wire
