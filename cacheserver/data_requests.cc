// The requests of the data plane that touch a context. Connections, fencing and Attach:
// data_service.cc.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "cacheserver/data_service.h"
#include "common/checksum.h"
#include "common/limits.h"
#include "kernels/int8_rows.h"

namespace icecache {
namespace {

double Seconds(Duration d) { return std::chrono::duration<double>(d).count(); }
uint64_t Nanos(Duration d) { return static_cast<uint64_t>(std::max<int64_t>(0, d.count())); }

// Adds a part of a body; one that begins where the last one ends in memory continues it, as the K
// rows, V rows and positions of a full page do.
void AddPart(std::span<const std::byte> part, std::vector<std::span<const std::byte>>* body) {
  if (part.empty()) return;
  if (!body->empty() && body->back().data() + body->back().size() == part.data()) {
    body->back() = {body->back().data(), body->back().size() + part.size()};
    return;
  }
  // Memory is asked for the first lines now; the transport copies when all parts are listed, and no
  // hardware prefetcher is ahead at the start of a page.
  for (size_t line = 0; line < std::min<size_t>(part.size(), 4 * 64); line += 64) {
    __builtin_prefetch(part.data() + line);
  }
  body->push_back(part);
}

// Only what travels is coded: pages in mapped memory are read as they are.
bool Coded(uint8_t flags) {
  return (flags & wire::kSelectInt8) != 0 &&
         (flags & (wire::kSelectMapped | wire::kSelectAttend)) == 0;
}

// A channel's minimum and step would take more than so few rows.
constexpr uint32_t kCodedRowsMin = 8;

// Replaces the rows of whole pages in the body by their int8 code. The memory behind the codes.
std::shared_ptr<const void> CodePages(const ModelShape& shape, wire::SelectReply* reply) {
  const auto codable = [](const wire::PagePayload& page) {
    return page.place == wire::PagePlace::kBody && page.from == 0 && page.fill >= kCodedRowsMin;
  };
  size_t pages = 0;
  for (const wire::HeadSelection& head : reply->heads) {
    pages += static_cast<size_t>(std::count_if(head.pages.begin(), head.pages.end(), codable));
  }
  if (pages == 0) return nullptr;
  const size_t room = Int8RowsBytesMax(shape.dtype, limits::kPageTokens, shape.head_dim);
  std::shared_ptr<std::byte[]> codes(new std::byte[pages * room]);
  std::byte* at = codes.get();
  for (wire::HeadSelection& head : reply->heads) {
    for (wire::PagePayload& page : head.pages) {
      if (!codable(page)) continue;
      const size_t bytes = EncodeInt8Rows(
          {shape.dtype, shape.head_dim, page.fill, page.k_rows.data(), page.v_rows.data()}, at);
      if (bytes >= page.k_rows.size() + page.v_rows.size()) continue;
      page.coded = {at, bytes};
      page.coded_bytes = static_cast<uint32_t>(bytes);
      page.coded_checksum = PageChecksum({page.segment.value, page.page.value, page.version},
                                         page.coded, {}, page.positions);
      page.k_rows = page.v_rows = {};
      at += bytes;
    }
  }
  return codes;
}

}  // namespace

Status DataService::PutRows(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, true));
  const ModelShape& shape = fenced.context->spec().shape;
  KV_ASSIGN_OR_RETURN(const wire::PutRowsRequest request,
                      wire::DecodePutRowsRequest(message, shape));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.slices.epoch));
  for (size_t i = 0; i < request.slices.heads.size(); ++i) {
    KV_RETURN_IF_ERROR(fenced.context->PutRows(request.slices.layer, request.slices.heads[i],
                                               request.first_position, request.token_count,
                                               request.k_rows(i, shape), request.v_rows(i, shape)));
  }
  rows_received_.Add(uint64_t{request.token_count} * request.slices.heads.size());
  OutMessage reply;
  wire::Encode(wire::PutRowsReply{.next_position = request.first_position + request.token_count},
               &reply);
  Reply(connection, message, std::move(reply));
  return OkStatus();
}

// One Build request: answered when the last of its heads stands.
struct DataService::BuildInFlight {
  uint64_t connection = 0;
  uint64_t request = 0;
  size_t heads_left = 0;
  uint32_t pages = 0;
  Status status;
};

Status DataService::Build(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, true));
  const ModelShape& shape = fenced.context->spec().shape;
  KV_ASSIGN_OR_RETURN(wire::BuildRequest request, wire::DecodeBuildRequest(message, shape));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.slices.epoch));
  if (request.slices.heads.empty()) return InvalidArgument("build: no heads");
  auto build = std::make_shared<BuildInFlight>();
  build->connection = connection.id;
  build->request = message.id;
  build->heads_left = request.slices.heads.size();
  const TimePoint give_up = EndOfPatience(message);
  const std::span<const float> energy(request.decoded_query_energy);
  for (size_t i = 0; i < request.slices.heads.size(); ++i) {
    const std::span<const float> of_head =
        energy.empty() ? energy : energy.subspan(i * shape.head_dim, shape.head_dim);
    std::shared_ptr<const Packing> proposed;
    if (!request.layouts.empty()) {
      proposed = std::make_shared<Packing>(std::move(request.layouts[i]));
    }
    // A head that fails does not stop the others: they were asked for too, and a repeated Build
    // finds them done.
    shard_.Build(
        request.slices.context, request.slices.layer, request.slices.heads[i], request.token_count,
        of_head, std::move(proposed),
        [this, build, alive = std::weak_ptr<int>(alive_)](Result<uint32_t> pages) {
          if (alive.expired()) return;
          if (pages.ok()) {
            build->pages += *pages;
          } else if (build->status.ok()) {
            build->status = pages.status();
          }
          if (--build->heads_left == 0) FinishBuild(*build);
        },
        give_up);
  }
  return OkStatus();
}

void DataService::FinishBuild(const BuildInFlight& build) {
  auto it = connections_.find(build.connection);
  if (it == connections_.end()) return;
  if (!build.status.ok()) {
    Count(wire::kBuild, build.status.code());
    it->second->channel->ReplyError(build.request, build.status);
    return;
  }
  OutMessage reply;
  wire::Encode(wire::BuildReply{.pages = build.pages}, &reply);
  InMessage request;
  request.kind = wire::kBuild;
  request.id = build.request;
  Reply(*it->second, request, std::move(reply));
}

Status DataService::AppendRows(const Fenced& fenced, const wire::SelectRequest& request) {
  if (request.append_count == 0) return OkStatus();
  if (!fenced.lease->writable) {
    return PermissionDenied(
        "select: rows to append, but the context was opened to read; fork it first");
  }
  const ModelShape& shape = fenced.context->spec().shape;
  for (size_t i = 0; i < request.heads.size(); ++i) {
    KV_RETURN_IF_ERROR(fenced.context->Append(
        request.layer, request.heads[i].head, request.append_first, request.append_count,
        request.append_k(i, shape), request.append_v(i, shape)));
  }
  rows_received_.Add(uint64_t{request.append_count} * request.heads.size());
  return OkStatus();
}

// All heads, also after a miss: what they lack is brought together.
Status DataService::SelectHeads(Context& context, const wire::SelectRequest& request,
                                Misses* misses) {
  const ModelShape& shape = context.spec().shape;
  const size_t floats_per_head = size_t{shape.group()} * shape.head_dim;
  scratch_.heads.resize(request.heads.size());
  AnswerOptions answer;
  answer.attend_missing = (request.flags & wire::kSelectAttend) != 0;
  answer.whole_pages = Coded(request.flags);
  for (size_t i = 0; i < request.heads.size(); ++i) {
    const wire::SelectHead& head = request.heads[i];
    SelectRequest select;
    select.queries = request.queries.data() + i * floats_per_head;
    select.group = shape.group();
    select.max_pages = request.max_pages;
    select.read_cap = request.read_cap;
    select.min_mass = request.min_mass;
    select.rank = static_cast<GroupRank>(request.rank);
    select.local_lse = head.local_lse.empty() ? nullptr : head.local_lse.data();
    select.residual = (request.flags & wire::kSelectNoResidual) == 0;
    wire::HeadSelection& chosen = scratch_.heads[i];
    answer.near = head.near;
    KV_RETURN_IF_ERROR(
        context.Select(request.layer, head.head, select, head.resident, &chosen, misses, answer));
    if (!misses->empty()) continue;
    context.ObserveQueries(request.layer, head.head, select.queries);
    if ((request.flags & wire::kSelectCheck) != 0)
      KV_RETURN_IF_ERROR(CheckHead(context, request.layer, select.queries, chosen));
    tokens_read_.Add(chosen.tokens_read);
  }
  return OkStatus();
}

// The worker reads these rows in the tenant's extents. Nothing keeps the frames for it: it verifies
// what it has read, and a frame that was reused meanwhile does not pass.
void DataService::NameByExtent(wire::HeadSelection* selection) {
  for (wire::PagePayload& page : selection->pages) {
    // Extent 0: a page of a shared context of another tenant, which comes in the body.
    if (page.from == page.fill || page.extent == 0 || page.place != wire::PagePlace::kBody)
      continue;
    bytes_mapped_.Add(page.k_rows.size() + page.v_rows.size() + page.positions.size());
    page.place = wire::PagePlace::kMapped;
    page.k_rows = page.v_rows = page.positions = {};
  }
}

Status DataService::CheckHead(const Context& context, LayerId layer, const float* queries,
                              const wire::HeadSelection& selection) {
  constexpr float kMillion = 1e6f;
  constexpr float kErrorMax = 1e3f;  // an error beyond is as bad, and the sum stays a number
  KV_ASSIGN_OR_RETURN(const std::optional<SelectionCheck> check,
                      context.CheckSelection(layer, selection.head, queries, selection));
  if (!check) {
    checks_skipped_.Add();
    return OkStatus();
  }
  checks_.Add();
  checked_mass_.Add(static_cast<uint64_t>(kMillion * check->mass));
  checked_error_.Add(static_cast<uint64_t>(kMillion * std::min(kErrorMax, check->output_error)));
  return OkStatus();
}

void DataService::CountPages(const wire::HeadSelection& selection) {
  uint64_t resident = 0, mapped = 0, pushed = 0, attended = 0;
  for (const wire::PagePayload& page : selection.pages) {
    if (page.place == wire::PagePlace::kMapped) {
      ++mapped;
    } else if (page.place == wire::PagePlace::kPushed) {
      ++pushed;
    } else if (page.place == wire::PagePlace::kAttended) {
      ++attended;
    } else if (page.from == page.fill) {
      ++resident;
    }
  }
  pages_resident_.Add(resident);
  pages_mapped_.Add(mapped);
  pages_pushed_.Add(pushed);
  pages_attended_.Add(attended);
  pages_returned_.Add(selection.pages.size() - resident - mapped - pushed - attended);
}

Status DataService::GatherPages(OutMessage* out) const {
  uint64_t bytes = 0;
  for (const wire::HeadSelection& head : scratch_.heads) {
    for (const wire::PagePayload& page : head.pages) {
      for (std::span<const std::byte> part :
           {page.coded, page.k_rows, page.v_rows, page.positions}) {
        AddPart(part, &out->body);
        bytes += part.size();
      }
    }
  }
  if (bytes > limits::kDataBodyBytesMax || out->body.size() > limits::kBodyPartsMax) {
    return ResourceExhausted("the reply would hold " + std::to_string(bytes) + " bytes in " +
                             std::to_string(out->body.size()) + " parts, at most " +
                             std::to_string(limits::kDataBodyBytesMax) + " and " +
                             std::to_string(limits::kBodyPartsMax) +
                             "; ask for fewer pages or heads at a time");
  }
  return OkStatus();
}

// For `icecachectl explain`.
void DataService::RememberSelection(const wire::SelectRequest& request, Duration took) {
  SelectionRecord record;
  record.when = reactor_.clock().Now();
  record.layer = request.layer;
  record.heads = static_cast<uint32_t>(scratch_.heads.size());
  for (const wire::HeadSelection& head : scratch_.heads) {
    record.pages += static_cast<uint32_t>(head.pages.size());
    for (const wire::PagePayload& page : head.pages)
      record.resident_pages += page.from == page.fill && page.place == wire::PagePlace::kBody;
    record.tokens_read += head.tokens_read;
    record.covered_mass += head.covered_mass / static_cast<float>(scratch_.heads.size());
  }
  record.select_ns = Nanos(took);
  shard_.Remember(request.context, record);
}

Status DataService::Select(Connection& connection, const InMessage& message) {
  const TimePoint begin = reactor_.clock().Now();
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, false));
  Context& context = *fenced.context;
  KV_ASSIGN_OR_RETURN(const wire::SelectRequest request,
                      wire::DecodeSelectRequest(message, context.spec().shape));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.epoch));
  if (request.heads.empty()) return InvalidArgument("select: no heads");
  KV_RETURN_IF_ERROR(AppendRows(fenced, request));
  const TimePoint appended = reactor_.clock().Now();
  Misses misses;
  KV_RETURN_IF_ERROR(SelectHeads(context, request, &misses));
  if (!misses.empty()) return WaitForPages(misses);
  (requests_.at(current_)->give_up ? selections_cold_ : selections_warm_).Add();
  const TimePoint selected = reactor_.clock().Now();

  OutMessage reply;
  std::shared_ptr<const void> codes;
  const std::vector<PushSpan> pushed = PlaceInRegion(connection, request);
  for (wire::HeadSelection& head : scratch_.heads) {
    if ((request.flags & wire::kSelectMapped) != 0) NameByExtent(&head);
    CountPages(head);
  }
  if (Coded(request.flags)) codes = CodePages(context.spec().shape, &scratch_);
  KV_RETURN_IF_ERROR(GatherPages(&reply));
  // Before anything changes: the parts point into frames.
  reply.pin = std::make_shared<std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>>(
      shard_.pool().Pin(), std::move(codes));
  KV_ASSIGN_OR_RETURN(scratch_.next_position,
                      context.NextPosition(request.layer, request.heads.front().head));
  scratch_.select_ns = Nanos(selected - begin);
  const TimePoint gathered = reactor_.clock().Now();
  scratch_.gather_ns = Nanos(gathered - selected);
  wire::Encode(scratch_, &reply);
  if (pushed.empty()) {
    Reply(connection, message, std::move(reply));
  } else {
    ReplyWhenPushed(connection, message, std::move(reply), pushed);
  }

  append_seconds_.ObserveSeconds(Seconds(appended - begin));
  select_seconds_.ObserveSeconds(Seconds(selected - appended));
  gather_seconds_.ObserveSeconds(Seconds(gathered - selected));
  RememberSelection(request, selected - begin);
  if (request.append_count > 0) {
    std::vector<KvHeadId> heads;
    for (const wire::SelectHead& head : request.heads) heads.push_back(head.head);
    shard_.IndexLater(request.context, request.layer, heads);
  }
  return OkStatus();
}

Status DataService::FetchRows(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, false));
  const ModelShape& shape = fenced.context->spec().shape;
  KV_ASSIGN_OR_RETURN(const wire::FetchRowsRequest request,
                      wire::DecodeFetchRowsRequest(message, shape));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.slices.epoch));
  // Copied into one block: rare (once per context and layer), and the checksum is over the whole
  // body.
  auto body = std::make_shared<std::vector<std::byte>>();
  wire::FetchRowsReply header;
  Misses misses;
  for (size_t i = 0; i < request.slices.heads.size(); ++i) {
    KV_RETURN_IF_ERROR(CopyRows(*fenced.context, request, i, &header, body.get(), &misses));
  }
  if (!misses.empty()) return WaitForPages(misses);
  header.checksum = Checksum64(*body);
  OutMessage reply;
  wire::Encode(header, &reply);
  if (!body->empty()) reply.body.push_back(*body);
  reply.pin = std::move(body);
  Reply(connection, message, std::move(reply));
  return OkStatus();
}

// The i-th head's K rows, then V rows, at the end of *body.
Status DataService::CopyRows(const Context& context, const wire::FetchRowsRequest& request,
                             size_t i, wire::FetchRowsReply* header, std::vector<std::byte>* body,
                             Misses* misses) {
  const LayerId layer = request.slices.layer;
  const KvHeadId head = request.slices.heads[i];
  const bool range = request.part == wire::RowsPart::kRange;
  RowsView rows;
  rows.first_position = request.first_position;
  rows.rows.count = request.token_count;
  if (!range) {
    KV_ASSIGN_OR_RETURN(rows, context.FetchRows(layer, head, request.part));
  }
  if (i == 0) {
    header->first_position = rows.first_position;
    header->count = rows.rows.count;
  } else if (rows.first_position != header->first_position || rows.rows.count != header->count) {
    return FailedPrecondition("fetch rows: heads of layer " + std::to_string(layer.value) +
                              " hold different rows; the context is still being written");
  }
  const size_t bytes = size_t{rows.rows.count} * context.spec().shape.row_bytes();
  const size_t at = body->size();
  if (at + 2 * bytes > limits::kDataBodyBytesMax) {
    return ResourceExhausted(
        "fetch rows: more than one reply can hold; ask for fewer heads at a time");
  }
  body->resize(at + 2 * bytes);
  std::byte* const k = body->data() + at;
  if (range) {
    return context.ReadRows(layer, head,
                            {request.first_position, request.token_count, k, k + bytes}, misses);
  }
  if (bytes > 0) {
    std::memcpy(k, rows.rows.k, bytes);
    std::memcpy(k + bytes, rows.rows.v, bytes);
  }
  return OkStatus();
}

Status DataService::FetchPages(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, false));
  KV_ASSIGN_OR_RETURN(const wire::FetchPagesRequest request,
                      wire::DecodeFetchPagesRequest(message, fenced.context->spec().shape));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.epoch));
  scratch_.heads.resize(1);
  Misses misses;
  KV_RETURN_IF_ERROR(fenced.context->FetchPages(request.layer, request.head, request.pages,
                                                &scratch_.heads[0], &misses));
  if (!misses.empty()) return WaitForPages(misses);
  if ((request.flags & wire::kSelectMapped) != 0) NameByExtent(&scratch_.heads[0]);
  OutMessage reply;
  KV_RETURN_IF_ERROR(GatherPages(&reply));
  reply.pin = shard_.pool().Pin();
  scratch_.select_ns = scratch_.gather_ns = 0;
  KV_ASSIGN_OR_RETURN(scratch_.next_position,
                      fenced.context->NextPosition(request.layer, request.head));
  wire::Encode(scratch_, &reply);
  Reply(connection, message, std::move(reply));
  return OkStatus();
}

Status DataService::GiveExtentKeys(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const Fenced fenced, Fence(connection, message, false));
  KV_ASSIGN_OR_RETURN(const wire::ExtentKeysRequest request,
                      wire::DecodeExtentKeysRequest(message));
  KV_RETURN_IF_ERROR(CheckEpoch(fenced, request.epoch));
  if (options_.keys == nullptr) return Unimplemented("extent keys: pages come inline here");
  KV_ASSIGN_OR_RETURN(const wire::ExtentKeysReply keys,
                      options_.keys->KeysFor(fenced.lease->tenant, request.serials));
  OutMessage reply;
  wire::Encode(keys, &reply);
  Reply(connection, message, std::move(reply));
  return OkStatus();
}

}  // namespace icecache
