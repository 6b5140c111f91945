#include "worker/cache_client.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/gpu/push_buffer.h"

namespace icecache {
namespace {

constexpr size_t kBuffersMax = 2 * limits::kShardsMax + limits::kSelectsPerBatchMax;

}  // namespace

// One Select in the air. Shared with the callbacks of its calls, which may outlive an interrupted
// Select.
struct SelectState {
  ContextHandle context;
  LayerId layer;
  uint32_t max_pages = 0;
  uint32_t append_end = 0;
  TimePoint deadline;
  SelectParams params;                   // its pointers are good while sink
  SelectionSink* sink = nullptr;         // null: nobody waits any more
  bool retried = false;
  std::vector<std::pair<ShardId, std::vector<KvHeadId>>> lost;  // to be asked once more
  uint32_t open = 0;                                            // calls without an end
  Status error;
  SelectOutcome outcome;
  std::vector<std::shared_ptr<const gpu::PushRegion>> lent;  // until its pages are settled
};

namespace {

// The rows of a page that the server has written into memory of the device: their addresses there.
// They stay empty where it says that they lie elsewhere than it was told.
void PointRowsAtRegion(const SelectState& state, wire::PagePayload* page) {
  const size_t bytes = (size_t{page->fill} - page->from) * state.context.shape.row_bytes();
  for (const auto& region : state.lent) {
    if (page->offset < region->offset || page->offset - region->offset > region->bytes ||
        2 * bytes > region->bytes - (page->offset - region->offset)) {
      continue;
    }
    page->k_rows = {region->buffer + page->offset, bytes};
    page->v_rows = {region->buffer + page->offset + bytes, bytes};
    return;
  }
}

}  // namespace

Result<std::unique_ptr<CacheClient>> CacheClient::Connect(Reactor& reactor, Transport& transport,
                                                          const std::vector<std::string>& shards,
                                                          const CacheClientOptions& options) {
  if (shards.empty() || shards.size() > limits::kShardsMax) {
    return InvalidArgument("the server named " + std::to_string(shards.size()) +
                           " shards, expected 1 to " + std::to_string(limits::kShardsMax));
  }
  std::unique_ptr<CacheClient> client(new CacheClient(reactor, options));
  ShardLinkOptions link;
  link.channel = options.channel;
  link.request_deadline = options.request_deadline;
  link.mode = options.reply_mode;
  link.leases_alive = options.leases_alive;
  link.device = options.device;
  const auto count = static_cast<uint32_t>(shards.size());
  for (uint16_t i = 0; i < count; ++i) {
    link.jitter_seed = options.jitter_seed == 0 ? 0 : options.jitter_seed + i;
    client->links_.push_back(
        std::make_unique<ShardLink>(reactor, transport, ShardId(i), count, shards[i], link));
    KV_RETURN_IF_ERROR(client->links_.back()->Open());
  }
  return client;
}

CacheClient::~CacheClient() {
  for (const auto& link : links_) link->Close();  // ends their calls while the rest still stands
}

uint64_t CacheClient::bytes_moved() const {
  uint64_t bytes = 0;
  for (const auto& link : links_) bytes += link->bytes_moved();
  return bytes;
}

uint64_t CacheClient::bytes_mapped() const {
  uint64_t bytes = 0;
  for (const auto& link : links_) bytes += link->bytes_mapped();
  return bytes;
}

uint32_t CacheClient::reconnects() const {
  uint32_t reconnects = 0;
  for (const auto& link : links_) reconnects += link->reconnects_done();
  return reconnects;
}

std::vector<KvHeadId> CacheClient::HeadsOf(LayerId layer, ShardId shard,
                                           const ModelShape& shape) const {
  std::vector<KvHeadId> heads;
  for (uint16_t h = 0; h < shape.kv_heads; ++h) {
    if (ShardOf(layer, KvHeadId(h), shape, shard_count()) == shard) heads.push_back(KvHeadId(h));
  }
  return heads;
}

Status CacheClient::Health() const {
  for (const auto& link : links_) KV_RETURN_IF_ERROR(link->Health());
  return OkStatus();
}

void CacheClient::Call(ShardId shard, OutMessage message, Duration deadline, Channel::Done done) {
  links_[shard.value]->Call(std::move(message), deadline, std::move(done));
}

Status CacheClient::Wait(const std::function<bool()>& done, Duration limit) {
  const auto interrupted = [this] { return options_.interrupted && options_.interrupted(); };
  reactor_.RunUntil([&] { return done() || interrupted(); }, reactor_.clock().Now() + limit);
  if (done()) return OkStatus();
  if (interrupted()) return Cancelled("interrupted");
  return DeadlineExceeded("no answer from the cache server in time");
}

Status CacheClient::Attach(const wire::Grant& grant) {
  struct State {
    size_t open = 0;
    Status error;
  };
  const auto state = std::make_shared<State>();
  state->open = links_.size();
  for (const auto& link : links_) {
    link->Attach(grant, [state](const Status& status) {
      --state->open;
      if (state->error.ok()) state->error = status;
    });
  }
  KV_RETURN_IF_ERROR(Wait([&] { return state->open == 0; }, options_.request_deadline + kGrace));
  return state->error;
}

std::shared_ptr<std::vector<std::byte>> CacheClient::Buffer() {
  for (const auto& buffer : buffers_) {
    if (buffer.use_count() == 1) return buffer;
  }
  auto buffer = std::make_shared<std::vector<std::byte>>();
  if (buffers_.size() < kBuffersMax) buffers_.push_back(buffer);
  return buffer;
}

OutMessage CacheClient::SelectMessage(SelectState& state, ShardId shard,
                                      const std::vector<KvHeadId>& heads) {
  const ModelShape& shape = state.context.shape;
  const SelectParams& params = state.params;
  wire::SelectRequest request;
  request.context = state.context.id;
  request.epoch = state.context.epoch;
  request.layer = params.layer;
  request.max_pages = params.max_pages;
  request.read_cap = params.read_cap;
  request.min_mass = params.min_mass;
  request.flags = params.residual ? 0 : wire::kSelectNoResidual;
  if (params.int8) request.flags |= wire::kSelectInt8;
  if (params.check) request.flags |= wire::kSelectCheck;
  const ReplyMode mode = links_[shard.value]->mode();
  if (mode == ReplyMode::kMapped || mode == ReplyMode::kRemote) {
    request.flags |= wire::kSelectMapped;
  }
  if (mode == ReplyMode::kAttend) request.flags |= wire::kSelectAttend;
  const size_t missing_max =
      heads.size() * params.max_pages * 2 * limits::kPageTokens * shape.row_bytes();
  if (auto region = links_[shard.value]->LendRegion(missing_max)) {
    request.push_offset = region->offset;
    request.push_bytes = region->bytes;
    state.lent.push_back(std::move(region));
  }
  request.append_first = params.append_first.value;
  request.append_count = static_cast<uint32_t>(params.append.size());

  const size_t query_bytes = size_t{shape.group()} * shape.head_dim * sizeof(float);
  const size_t row_bytes = shape.row_bytes();
  const std::shared_ptr<std::vector<std::byte>> buffer = Buffer();
  buffer->resize(heads.size() * (query_bytes + params.append.size() * 2 * row_bytes));
  std::byte* out = buffer->data();
  for (const KvHeadId head : heads) {
    wire::SelectHead& wanted = request.heads.emplace_back();
    wanted.head = head;
    if (params.max_pages > 0) state.sink->FillHead(&wanted);
    std::memcpy(out, reinterpret_cast<const std::byte*>(params.queries) + head.value * query_bytes,
                query_bytes);
    out += query_bytes;
  }
  for (const KvHeadId head : heads) {
    for (int part = 0; part < 2; ++part) {
      for (const LayerRows& token : params.append) {
        std::memcpy(out, (part == 0 ? token.k(head) : token.v(head)).data(), row_bytes);
        out += row_bytes;
      }
    }
  }
  OutMessage message;
  wire::Encode(request, &message);
  message.body.emplace_back(buffer->data(), buffer->size());
  message.pin = buffer;
  return message;
}

Result<SelectOutcome> CacheClient::Select(const ContextHandle& context, const SelectParams& params,
                                          SelectionSink& sink,
                                          const std::function<void()>& meanwhile) {
  const SelectCall call = StartSelect(context, params, sink);
  if (meanwhile) meanwhile();
  return FinishSelect(call, params.deadline);
}

SelectCall CacheClient::StartSelect(const ContextHandle& context, const SelectParams& params,
                                    SelectionSink& sink) {
  const TimePoint start = reactor_.clock().Now();
  const Duration handled = handling_;
  const auto state = std::make_shared<SelectState>();
  state->context = context;
  state->layer = params.layer;
  state->max_pages = params.max_pages;
  state->append_end = params.append_first.value + static_cast<uint32_t>(params.append.size());
  state->deadline = start + params.deadline;
  state->params = params;
  state->sink = &sink;
  for (uint16_t i = 0; i < shard_count(); ++i) {
    std::vector<KvHeadId> heads = HeadsOf(params.layer, ShardId(i), context.shape);
    if (!params.heads.empty()) {
      std::erase_if(heads, [&](KvHeadId head) {
        return !std::binary_search(params.heads.begin(), params.heads.end(), head);
      });
    }
    if (!heads.empty()) SendSelect(state, ShardId(i), heads, holding_);
  }
  if (!holding_) reactor_.Poll();  // hands over what the transport only queued
  state->outcome.sending = reactor_.clock().Now() - start - (handling_ - handled);
  return state;
}

Result<SelectOutcome> CacheClient::FinishSelect(const SelectCall& state, Duration limit) {
  const TimePoint wait_start = reactor_.clock().Now();
  const Duration handled = handling_;
  state->deadline = std::min(state->deadline, wait_start + limit);
  Status waited = Wait([&] { return state->open == 0; },
                       state->deadline - std::min(wait_start, state->deadline) + kGrace);
  if (waited.ok() && state->error.ok() && !state->lost.empty()) waited = RetryLost(state);
  if (waited.code() != StatusCode::kCancelled && state->error.ok()) {
    const Status settled = Settle(state);
    if (waited.ok()) waited = settled;
  }
  AbandonSelect(state);
  if (waited.code() == StatusCode::kCancelled) return waited;
  if (!waited.ok()) state->outcome.complete = state->outcome.confirmed = false;
  state->outcome.waiting = reactor_.clock().Now() - wait_start - (handling_ - handled);
  if (!state->error.ok()) return state->error;
  return state->outcome;
}

bool CacheClient::Arrived(const SelectCall& state) const { return state->open == 0; }

void CacheClient::AbandonSelect(const SelectCall& state) {
  state->sink = nullptr;
  state->params = {};
  if (state->open == 0) state->lent.clear();  // else shards may still write there
}

void CacheClient::SendSelect(const SelectCall& state, ShardId shard,
                             const std::vector<KvHeadId>& heads, bool hold) {
  const TimePoint now = reactor_.clock().Now();
  ++state->open;
  OutMessage message = SelectMessage(*state, shard, heads);
  state->outcome.bytes_moved += MessageBytes(message);
  const Duration deadline = std::max<Duration>(state->deadline - now, Duration(1));
  Channel::Done done = [this, state, shard, heads](const Result<InMessage>& reply) {
    OnSelectReply(state, shard, heads, reply);
  };
  if (!hold) return Call(shard, std::move(message), deadline, std::move(done));
  held_.resize(links_.size());
  held_[shard.value].push_back({std::move(message), deadline, std::move(done)});
}

Duration CacheClient::ReleaseSelects() {
  const TimePoint start = reactor_.clock().Now();
  const Duration handled = handling_;
  holding_ = false;
  for (uint16_t i = 0; i < held_.size(); ++i) {
    std::vector<Channel::Request> selects = std::exchange(held_[i], {});
    for (size_t at = 0; at < selects.size(); at += limits::kSelectsPerBatchMax) {
      const size_t end = std::min<size_t>(selects.size(), at + limits::kSelectsPerBatchMax);
      std::vector<Channel::Request> part(std::make_move_iterator(selects.begin() + at),
                                         std::make_move_iterator(selects.begin() + end));
      if (part.size() == 1) {
        Call(ShardId(i), std::move(part[0].message), part[0].deadline, std::move(part[0].done));
      } else {
        links_[i]->CallTogether(std::move(part));
      }
    }
  }
  reactor_.Poll();
  return reactor_.clock().Now() - start - (handling_ - handled);
}

// Asks the shards whose connection was lost in this Select again, once they are back. Repeating is
// harmless: rows that the shard has taken already are not taken twice.
Status CacheClient::RetryLost(const SelectCall& state) {
  state->retried = true;
  const auto left = [&] {
    return std::max<Duration>(state->deadline - reactor_.clock().Now(), Duration(0));
  };
  for (const auto& [shard, heads] : state->lost) {
    const ShardLink& link = *links_[shard.value];
    const Status waited = Wait([&link] { return link.ready() || !link.Health().ok(); }, left());
    if (waited.code() == StatusCode::kCancelled) return waited;
    if (!link.ready()) {
      const Status health = link.Health();
      state->error = !health.ok()
                         ? health
                         : Unavailable("shard " + std::to_string(shard.value) + " at " +
                                       link.address() + ": connection lost, and not back in time");
      return OkStatus();
    }
    SendSelect(state, shard, heads, false);
  }
  return Wait([&] { return state->open == 0; }, left() + kGrace);
}

// Errors of the sink are the call's; what is returned is that of waiting.
Status CacheClient::Settle(const SelectCall& state) {
  std::vector<HeadPages> damaged;
  state->error = state->sink->Settle(&damaged);
  if (!state->error.ok() || damaged.empty()) return OkStatus();
  for (HeadPages& head : damaged) {
    const ShardId shard = ShardOf(state->layer, head.head, state->context.shape, shard_count());
    Refetch(state, shard,
            {state->context.id, state->context.epoch, state->layer, head.head, head.pages});
  }
  const TimePoint now = reactor_.clock().Now();
  const Status waited = Wait([&] { return state->open == 0; },
                             state->deadline - std::min(now, state->deadline) + kGrace);
  damaged.clear();  // what is damaged again is done without
  if (state->error.ok()) state->error = state->sink->Settle(&damaged);
  return waited;
}

void CacheClient::ResolveNamed(const SelectState& state, ShardId shard, wire::SelectReply* reply) {
  for (wire::HeadSelection& head : reply->heads) {
    for (wire::PagePayload& page : head.pages) {
      if (page.place == wire::PagePlace::kPushed) PointRowsAtRegion(state, &page);
      if (page.place != wire::PagePlace::kMapped) continue;
      links_[shard.value]->Resolve(state.context.id, state.context.shape, &page);
    }
  }
}

void CacheClient::OnSelectReply(const SelectCall& state, ShardId shard,
                                const std::vector<KvHeadId>& heads,
                                const Result<InMessage>& reply) {
  if (--state->open == 0 && state->sink == nullptr) state->lent.clear();
  if (state->sink == nullptr || !state->error.ok()) return;
  const TimePoint start = reactor_.clock().Now();
  if (reply.ok()) state->outcome.bytes_moved += reply->meta.size() + reply->body.size();
  if (!reply.ok()) return OnSelectFailed(*state, shard, heads, reply.status());
  Result<wire::SelectReply> decoded = wire::DecodeSelectReply(*reply, state->context.shape);
  if (!decoded.ok()) {
    state->error = decoded.status().WithContext(links_[shard.value]->Name());
    return;
  }
  if (links_[shard.value]->remote()) return FetchRemote(state, shard, heads, std::move(*decoded));
  ResolveNamed(*state, shard, &*decoded);
  TakeSelectReply(state, shard, heads, *decoded, start);
}

void CacheClient::OnSelectFailed(SelectState& state, ShardId shard,
                                 const std::vector<KvHeadId>& heads, const Status& status) {
  if (status.code() == StatusCode::kUnavailable && !state.retried &&
      links_[shard.value]->reconnects()) {
    state.lost.emplace_back(shard, heads);
    return;
  }
  state.outcome.complete = state.outcome.confirmed = false;
  if (status.code() != StatusCode::kDeadlineExceeded) state.error = status;
}

// The reply outlives its message: whatever else it may hold, rows in the body are not used.
void CacheClient::FetchRemote(const SelectCall& state, ShardId shard,
                              const std::vector<KvHeadId>& heads, wire::SelectReply decoded) {
  for (wire::HeadSelection& head : decoded.heads) {
    for (wire::PagePayload& page : head.pages) {
      page.k_rows = page.v_rows = page.positions = page.coded = {};
    }
  }
  ++state->open;
  const auto reply = std::make_shared<wire::SelectReply>(std::move(decoded));
  links_[shard.value]->FetchRemote(
      state->context.id, state->context.epoch, state->context.shape, reply,
      [this, state, shard, heads, reply](const Status& status) {
        --state->open;
        if (state->sink == nullptr || !state->error.ok()) return;
        if (status.code() == StatusCode::kUnavailable) {
          return OnSelectFailed(*state, shard, heads, status);
        }
        // What could not be read is asked for inline, as a page that fails its check.
        TakeSelectReply(state, shard, heads, *reply, reactor_.clock().Now());
      });
}

void CacheClient::TakeSelectReply(const SelectCall& state, ShardId shard,
                                  const std::vector<KvHeadId>& heads,
                                  const wire::SelectReply& decoded, TimePoint start) {
  state->outcome.server_select_ns += decoded.select_ns;
  state->outcome.slowest_select_ns = std::max(state->outcome.slowest_select_ns, decoded.select_ns);
  if (decoded.next_position < state->append_end) state->outcome.confirmed = false;
  std::vector<wire::FetchPagesRequest> refetches;
  const Status status = ApplySelection(*state, heads, decoded, &refetches);
  if (!status.ok()) state->error = status.WithContext(links_[shard.value]->Name());
  if (const Status taken = state->sink->OnReplyTaken(); state->error.ok()) state->error = taken;
  const Duration took = reactor_.clock().Now() - start;
  state->outcome.handling += took;
  handling_ += took;
  for (const wire::FetchPagesRequest& request : refetches) Refetch(state, shard, request);
}

Status CacheClient::ApplySelection(SelectState& state, const std::vector<KvHeadId>& heads,
                                   const wire::SelectReply& reply,
                                   std::vector<wire::FetchPagesRequest>* refetches) {
  if (reply.heads.size() != heads.size()) {
    return DataLoss("selection for " + std::to_string(reply.heads.size()) + " heads, expected " +
                    std::to_string(heads.size()));
  }
  for (size_t i = 0; i < heads.size(); ++i) {
    const wire::HeadSelection& selection = reply.heads[i];
    if (selection.head != heads[i]) {
      return DataLoss("selection of kv head " + std::to_string(selection.head.value) +
                      ", expected " + std::to_string(heads[i].value));
    }
    if (selection.pages.size() > state.max_pages) {
      return DataLoss("selection of " + std::to_string(selection.pages.size()) +
                      " pages, asked for at most " + std::to_string(state.max_pages));
    }
    std::vector<wire::ResidentPage> bad;
    state.sink->OnSelection(selection, &bad);
    if (bad.empty()) continue;
    wire::FetchPagesRequest& request = refetches->emplace_back();
    request.context = state.context.id;
    request.epoch = state.context.epoch;
    request.layer = state.layer;
    request.head = heads[i];
    request.pages = std::move(bad);
  }
  return OkStatus();
}

void CacheClient::Refetch(const SelectCall& state, ShardId shard,
                          const wire::FetchPagesRequest& request) {
  const TimePoint now = reactor_.clock().Now();
  if (now >= state->deadline) {
    state->outcome.complete = false;
    return;
  }
  ++state->open;
  OutMessage message;
  wire::Encode(request, &message);
  Call(shard, std::move(message), state->deadline - now,
       [this, state, head = request.head](const Result<InMessage>& reply) {
         --state->open;
         if (state->sink == nullptr || !state->error.ok()) return;
         const TimePoint start = reactor_.clock().Now();
         const Result<wire::SelectReply> decoded =
             reply.ok() ? wire::DecodeSelectReply(*reply, state->context.shape)
                        : Result<wire::SelectReply>(reply.status());
         // What does not come is left out of this step, as a page that missed the deadline would
         // be.
         if (!decoded.ok() || decoded->heads.size() != 1 || decoded->heads[0].head != head) {
           state->outcome.complete = false;
           if (decoded.status().code() == StatusCode::kUnavailable) state->error = decoded.status();
           return;
         }
         for (const wire::PagePayload& page : decoded->heads[0].pages) {
           state->sink->OnRefetched(head, page);
         }
         state->error = state->sink->OnReplyTaken();
         const Duration took = reactor_.clock().Now() - start;
         state->outcome.bytes_moved += reply->meta.size() + reply->body.size();
         state->outcome.handling += took;
         handling_ += took;
       });
}

}  // namespace icecache
