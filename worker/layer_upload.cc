#include "worker/layer_upload.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>

#include "common/limits.h"

namespace icecache {
namespace {

struct Job {
  LayerId layer;
  ShardId shard;
  std::vector<KvHeadId> heads;
  uint32_t begin = 0;
  uint32_t count = 0;
  bool build = false;
  std::shared_ptr<const LayerRows> rows;
  std::vector<float> query_energy;  // of `heads`
  std::vector<Packing> layouts;     // likewise
  uint64_t bytes = 0;
};

}  // namespace

struct LayerUpload::State : std::enable_shared_from_this<State> {
  State(CacheClient& c, const ContextHandle& h) : client(&c), context(h) {}

  OutMessage RowsMessage(const Job& job) const {
    wire::PutRowsRequest request;
    request.slices = {context.id, context.epoch, job.layer, job.heads};
    request.first_position = job.rows->first().value + job.begin;
    request.token_count = job.count;
    OutMessage message;
    wire::Encode(request, &message);
    const size_t row_bytes = context.shape.row_bytes();
    for (const KvHeadId head : job.heads) {
      message.body.push_back(
          job.rows->k(head).subspan(job.begin * row_bytes, job.count * row_bytes));
      message.body.push_back(
          job.rows->v(head).subspan(job.begin * row_bytes, job.count * row_bytes));
    }
    message.pin = job.rows;
    return message;
  }

  OutMessage BuildMessage(const Job& job) const {
    wire::BuildRequest request;
    request.slices = {context.id, context.epoch, job.layer, job.heads};
    request.token_count = job.count;
    request.query_energy = job.query_energy;
    request.layouts = job.layouts;
    OutMessage message;
    wire::Encode(request, &message);
    return message;
  }

  Status CheckReply(const Job& job, const InMessage& reply) const {
    if (job.build) return wire::DecodeBuildReply(reply).status();
    KV_ASSIGN_OR_RETURN(const wire::PutRowsReply rows, wire::DecodePutRowsReply(reply));
    const uint32_t expected = job.rows->first().value + job.begin + job.count;
    if (rows.next_position == expected) return OkStatus();
    return DataLoss("layer " + std::to_string(job.layer.value) + ": shard " +
                    std::to_string(job.shard.value) + " holds rows up to position " +
                    std::to_string(rows.next_position) + ", expected " + std::to_string(expected));
  }

  void SendMore() {
    const uint64_t bytes_max = client->options().upload_bytes_in_flight_max;
    while (!queue.empty() && error.ok() && client != nullptr) {
      Job& next = queue.front();
      if (bytes_in_flight > 0 && bytes_in_flight + next.bytes > bytes_max) return;
      if (builds_in_flight + rows_in_flight >= limits::kRequestsInFlightMax / 2) return;
      const auto job = std::make_shared<Job>(std::move(next));
      queue.pop_front();
      bytes_in_flight += job->bytes;
      (job->build ? builds_in_flight : rows_in_flight) += 1;
      client->Call(
          job->shard, job->build ? BuildMessage(*job) : RowsMessage(*job),
          job->build ? client->options().build_deadline : client->options().request_deadline,
          [self = shared_from_this(), job](const Result<InMessage>& reply) {
            self->OnReply(*job, reply);
          });
    }
  }

  void OnReply(const Job& job, const Result<InMessage>& reply) {
    bytes_in_flight -= job.bytes;
    (job.build ? builds_in_flight : rows_in_flight) -= 1;
    const Status status = reply.ok() ? CheckReply(job, *reply) : reply.status();
    if (error.ok() && !status.ok()) {
      error = status.WithContext(job.build ? "build index" : "send rows");
      queue.clear();
    }
    if (client != nullptr) SendMore();
  }

  bool rows_queued() const {
    return std::any_of(queue.begin(), queue.end(), [](const Job& job) { return !job.build; });
  }

  CacheClient* client;  // null once the upload is gone
  const ContextHandle context;
  std::deque<Job> queue;
  uint64_t bytes_in_flight = 0;
  uint32_t rows_in_flight = 0;
  uint32_t builds_in_flight = 0;
  Status error;
};

LayerUpload::LayerUpload(CacheClient& client, const ContextHandle& context)
    : state_(std::make_shared<State>(client, context)) {}

LayerUpload::~LayerUpload() {
  state_->client = nullptr;
  state_->queue.clear();
}

void LayerUpload::Start(LayerId layer, std::shared_ptr<const LayerRows> rows,
                        std::vector<float> query_energy, std::vector<Packing> layouts) {
  if (!state_->error.ok()) return;
  const ModelShape& shape = state_->context.shape;
  const CacheClient& client = *state_->client;
  const uint32_t tokens = rows->tokens();
  for (uint32_t begin = 0; begin < tokens; begin += limits::kPutRowsTokensMax) {
    for (uint16_t s = 0; s < client.shard_count(); ++s) {
      Job job;
      job.layer = layer;
      job.shard = ShardId(s);
      job.heads = client.HeadsOf(layer, ShardId(s), shape);
      job.begin = begin;
      if (job.heads.empty()) continue;
      job.count = std::min(limits::kPutRowsTokensMax, tokens - begin);
      job.rows = rows;
      job.bytes = uint64_t{job.count} * job.heads.size() * 2 * shape.row_bytes();
      state_->queue.push_back(std::move(job));
    }
  }
  for (uint16_t s = 0; s < client.shard_count(); ++s) {
    Job job;
    job.layer = layer;
    job.shard = ShardId(s);
    job.heads = client.HeadsOf(layer, ShardId(s), shape);
    if (job.heads.empty()) continue;
    job.build = true;
    job.count = rows->first().value + tokens;
    for (const KvHeadId head : job.heads) {
      if (query_energy.empty()) break;
      const float* const energy = query_energy.data() + size_t{head.value} * shape.head_dim;
      job.query_energy.insert(job.query_energy.end(), energy, energy + shape.head_dim);
    }
    for (const KvHeadId head : job.heads) {
      if (layouts.empty()) break;
      job.layouts.push_back(std::move(layouts[head.value]));
      job.bytes += job.layouts.back().layout.tokens.size() * sizeof(uint32_t);
    }
    state_->queue.push_back(std::move(job));
  }
  state_->SendMore();
}

Status LayerUpload::WaitRows() {
  State& s = *state_;
  KV_RETURN_IF_ERROR(
      s.client->Wait([&] { return !s.error.ok() || (s.rows_in_flight == 0 && !s.rows_queued()); },
                     s.client->options().build_deadline));
  return s.error;
}

Status LayerUpload::WaitAll() {
  KV_RETURN_IF_ERROR(WaitRows());
  State& s = *state_;
  KV_RETURN_IF_ERROR(
      s.client->Wait([&] { return !s.error.ok() || (s.builds_in_flight == 0 && s.queue.empty()); },
                     s.client->options().build_deadline));
  return s.error;
}

Status LayerUpload::error() const { return state_->error; }

}  // namespace icecache
