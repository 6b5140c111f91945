#include "cacheserver/ctl/smoke.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <utility>

#include "common/channel.h"
#include "common/checksum.h"
#include "common/wire/data_codec.h"

namespace icecache {
namespace {

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 8, .head_dim = 64, .dtype = DType::kF32};
constexpr uint32_t kSinks = 4, kWindow = 32, kPages = 16;
constexpr Duration kPatience = std::chrono::seconds(20);

class Smoke {
 public:
  Smoke(Reactor& reactor, ControlClient& control, const SmokeOptions& options)
      : reactor_(reactor), control_(control), options_(options), random_(options.seed) {}

  Result<SmokeResult> Run() {
    KV_RETURN_IF_ERROR(Attach());
    Status status = Upload();
    if (status.ok()) status = Select();
    const Status released = control_.Release(grant_.context.id);
    if (!status.ok()) return status;
    if (!released.ok()) return released;
    return result_;
  }

 private:
  Status Attach() {
    KV_ASSIGN_OR_RETURN(transport_, MakeUcxTransport(reactor_, {}));
    for (const std::string& shard : control_.hello().shards) {
      KV_ASSIGN_OR_RETURN(std::unique_ptr<Endpoint> endpoint, transport_->Connect(shard));
      channels_.push_back(std::make_unique<Channel>(reactor_, std::move(endpoint)));
    }
    wire::Create create;
    create.name = "icecachectl-smoke-" + std::to_string(getpid());
    create.shape = kShape;
    create.model = "smoke";
    create.sink_tokens = kSinks;
    create.window_tokens = kWindow;
    create.policy = "cluster_tree";
    KV_ASSIGN_OR_RETURN(grant_, control_.Create(create));
    for (uint16_t shard = 0; shard < channels_.size(); ++shard) {
      OutMessage message;
      wire::Encode(wire::AttachRequest{.ticket = grant_.ticket}, &message);
      KV_RETURN_IF_ERROR(
          Call(shard, std::move(message), [](const InMessage&) { return OkStatus(); }));
    }
    return OkStatus();
  }

  // One request; `take` sees its reply.
  Status Call(uint16_t shard, OutMessage message,
              const std::function<Status(const InMessage&)>& take) {
    const auto answer = std::make_shared<std::optional<Status>>();
    channels_[shard]->Call(std::move(message), kPatience,
                           [answer, take](const Result<InMessage>& reply) {
                             *answer = reply.ok() ? take(*reply) : reply.status();
                           });
    reactor_.RunUntil([&] { return answer->has_value(); }, reactor_.clock().Now() + 2 * kPatience);
    if (!answer->has_value())
      return DeadlineExceeded("shard " + std::to_string(shard) + " is silent");
    return (**answer).WithContext("shard " + std::to_string(shard));
  }

  uint16_t ShardOfSlice(uint16_t layer, uint16_t head) const {
    return ShardOf(LayerId(layer), KvHeadId(head), kShape, static_cast<uint32_t>(channels_.size()))
        .value;
  }
  // K then V of all tokens of a slice.
  std::vector<float>& Rows(uint16_t layer, uint16_t head) {
    return rows_[size_t{layer} * kShape.kv_heads + head];
  }
  wire::SliceSet Slices(uint16_t layer, uint16_t head) const {
    return {.context = grant_.context.id,
            .epoch = grant_.epoch,
            .layer = LayerId(layer),
            .heads = {KvHeadId(head)}};
  }

  Status Upload() {
    std::normal_distribution<float> normal(0, 1);
    rows_.resize(size_t{kShape.layers} * kShape.kv_heads);
    for (auto& rows : rows_) {
      rows.resize(size_t{2} * options_.tokens * kShape.head_dim);
      for (float& x : rows) x = normal(random_);
      result_.rows_bytes += rows.size() * sizeof(float);
    }
    const TimePoint begin = reactor_.clock().Now();
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint16_t head = 0; head < kShape.kv_heads; ++head)
        KV_RETURN_IF_ERROR(UploadSlice(layer, head));
    }
    result_.upload_seconds = std::chrono::duration<double>(reactor_.clock().Now() - begin).count();
    return OkStatus();
  }

  Status UploadSlice(uint16_t layer, uint16_t head) {
    const std::span<const float> rows = Rows(layer, head);
    const uint16_t shard = ShardOfSlice(layer, head);
    for (uint32_t first = 0; first < options_.tokens; first += limits::kPutRowsTokensMax) {
      const uint32_t count = std::min(limits::kPutRowsTokensMax, options_.tokens - first);
      OutMessage message;
      wire::Encode(
          wire::PutRowsRequest{
              .slices = Slices(layer, head), .first_position = first, .token_count = count},
          &message);
      for (const uint32_t part : {0u, options_.tokens}) {
        message.body.push_back(std::as_bytes(
            rows.subspan(size_t{part + first} * kShape.head_dim, size_t{count} * kShape.head_dim)));
      }
      KV_RETURN_IF_ERROR(Call(shard, std::move(message), [](const InMessage& reply) {
        return wire::DecodePutRowsReply(reply).status();
      }));
    }
    OutMessage message;
    wire::Encode(wire::BuildRequest{.slices = Slices(layer, head), .token_count = options_.tokens},
                 &message);
    return Call(shard, std::move(message),
                [](const InMessage& reply) { return wire::DecodeBuildReply(reply).status(); });
  }

  Status Select() {
    std::vector<double> micros;
    for (uint32_t i = 0; i < options_.selections; ++i) {
      const auto layer = static_cast<uint16_t>(i % kShape.layers);
      const auto head = static_cast<uint16_t>(i / kShape.layers % kShape.kv_heads);
      const TimePoint begin = reactor_.clock().Now();
      KV_RETURN_IF_ERROR(SelectOnce(layer, head));
      micros.push_back(
          std::chrono::duration<double, std::micro>(reactor_.clock().Now() - begin).count());
    }
    std::sort(micros.begin(), micros.end());
    if (micros.empty()) return OkStatus();
    result_.select_p50_us = micros[micros.size() / 2];
    result_.select_p99_us = micros[micros.size() * 99 / 100];
    result_.select_max_us = micros.back();
    return OkStatus();
  }

  Status SelectOnce(uint16_t layer, uint16_t head) {
    std::normal_distribution<float> normal(0, 0.5);
    std::vector<float> queries(size_t{kShape.group()} * kShape.head_dim);
    for (float& x : queries) x = normal(random_);
    wire::SelectRequest request;
    request.context = grant_.context.id;
    request.epoch = grant_.epoch;
    request.layer = LayerId(layer);
    request.heads = {{.head = KvHeadId(head), .resident = {}, .local_lse = {}}};
    request.max_pages = kPages;
    request.read_cap = 1024;
    request.append_first = options_.tokens - kWindow;
    OutMessage message;
    wire::Encode(request, &message);
    message.body.push_back(std::as_bytes(std::span(queries)));
    return Call(ShardOfSlice(layer, head), std::move(message), [&](const InMessage& reply) {
      KV_ASSIGN_OR_RETURN(const wire::SelectReply decoded, wire::DecodeSelectReply(reply, kShape));
      if (decoded.heads.size() != 1 || decoded.heads[0].pages.empty())
        return Status(DataLoss("a selection without pages"));
      for (const wire::PagePayload& page : decoded.heads[0].pages)
        KV_RETURN_IF_ERROR(CheckPage(layer, head, page));
      return OkStatus();
    });
  }

  Status CheckPage(uint16_t layer, uint16_t head, const wire::PagePayload& page) {
    const std::string name = "page " + std::to_string(page.page.value) + " of layer " +
                             std::to_string(layer) + ", kv head " + std::to_string(head);
    if (PageChecksum({page.segment.value, page.page.value, page.version}, page.k_rows, page.v_rows,
                     page.positions) != page.checksum) {
      return DataLoss(name + " does not match its checksum");
    }
    const std::vector<float>& rows = Rows(layer, head);
    const size_t row_bytes = kShape.row_bytes();
    for (uint32_t i = 0; i < page.fill; ++i) {
      uint32_t position = 0;
      std::memcpy(&position, page.positions.data() + i * sizeof position, sizeof position);
      if (position >= options_.tokens) return DataLoss(name + ": position out of range");
      const auto same = [&](std::span<const std::byte> found, uint32_t token) {
        return std::memcmp(found.data() + i * row_bytes,
                           rows.data() + size_t{token} * kShape.head_dim, row_bytes) == 0;
      };
      if (!same(page.k_rows, position) || !same(page.v_rows, options_.tokens + position))
        return DataLoss(name + ": position " + std::to_string(position) + " is not what was sent");
    }
    ++result_.pages;
    return OkStatus();
  }

  Reactor& reactor_;
  ControlClient& control_;
  const SmokeOptions options_;
  std::mt19937_64 random_;
  std::unique_ptr<Transport> transport_;
  std::vector<std::unique_ptr<Channel>> channels_;  // by shard
  wire::Grant grant_;
  std::vector<std::vector<float>> rows_;  // by slice
  SmokeResult result_;
};

}  // namespace

Result<SmokeResult> RunSmoke(Reactor& reactor, ControlClient& control,
                             const SmokeOptions& options) {
  return Smoke(reactor, control, options).Run();
}

}  // namespace icecache
