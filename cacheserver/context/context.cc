#include "cacheserver/context/context.h"

#include <algorithm>
#include <string>

namespace icecache {

namespace {

std::string SliceName(LayerId layer, KvHeadId head) {
  return "layer " + std::to_string(layer.value) + " kv head " + std::to_string(head.value);
}

Status CheckSpec(const ContextSpec& spec) {
  KV_RETURN_IF_ERROR(spec.shape.Validate());
  if (spec.sink_tokens > limits::kSinkTokensMax) {
    return InvalidArgument("sink_tokens " + std::to_string(spec.sink_tokens) + ", at most " +
                           std::to_string(limits::kSinkTokensMax));
  }
  if (spec.window_tokens > limits::kWindowTokensMax) {
    return InvalidArgument("window_tokens " + std::to_string(spec.window_tokens) + ", at most " +
                           std::to_string(limits::kWindowTokensMax));
  }
  if (spec.shard_count == 0 || spec.shard_count > limits::kShardsMax ||
      spec.shard.value >= spec.shard_count) {
    return InvalidArgument("shard " + std::to_string(spec.shard.value) + " of " +
                           std::to_string(spec.shard_count) + ", at most " +
                           std::to_string(limits::kShardsMax));
  }
  return OkStatus();
}

SegmentSpec PrivateSegment(const ContextSpec& spec, uint32_t first_position) {
  SegmentSpec segment;
  segment.id = spec.segment;
  segment.first_position = first_position;
  segment.tenant = spec.tenant;
  segment.shape = spec.shape;
  segment.policy = spec.policy;
  segment.seed = spec.seed;
  segment.shard = spec.shard;
  segment.shard_count = spec.shard_count;
  return segment;
}

// REQUIRES: body length checked against the shape by the caller below.
Result<TokenRows> MakeRows(const ModelShape& shape, uint32_t token_count,
                           std::span<const std::byte> k, std::span<const std::byte> v) {
  const size_t expected = token_count * shape.row_bytes();
  if (k.size() != expected || v.size() != expected) {
    return InvalidArgument(std::to_string(token_count) + " rows of " +
                           std::to_string(shape.row_bytes()) + " bytes expected, K has " +
                           std::to_string(k.size()) + " and V " + std::to_string(v.size()) +
                           " bytes");
  }
  return TokenRows{shape.dtype, shape.head_dim, token_count, k.data(), v.data()};
}

}  // namespace

Context::Context(const ContextSpec& spec, PagePool& pool, AttentionBackend& attention)
    : spec_(spec), pool_(pool), attention_(attention) {}

Result<std::unique_ptr<Context>> Context::Create(const ContextSpec& spec, PagePool& pool,
                                                 AttentionBackend& attention) {
  KV_RETURN_IF_ERROR(CheckSpec(spec));
  std::unique_ptr<Context> context(new Context(spec, pool, attention));
  context->tail_ = std::make_shared<Segment>(pool, PrivateSegment(spec, 0));
  return context;
}

Result<std::unique_ptr<Context>> Context::Fork(const Context& parent, const ContextSpec& spec) {
  KV_RETURN_IF_ERROR(CheckSpec(spec));
  const ContextSpec& from = parent.spec_;
  if (spec.shape != from.shape || spec.shard != from.shard ||
      spec.shard_count != from.shard_count || spec.sink_tokens != from.sink_tokens ||
      spec.window_tokens != from.window_tokens) {
    return InvalidArgument("fork: shape, shard, sinks and window must be those of context " +
                           std::to_string(from.id.value));
  }
  if (!parent.sealed()) {
    return FailedPrecondition("fork: context " + std::to_string(from.id.value) +
                              " is not sealed; seal it first");
  }
  return Grow(spec, parent.chain_, parent.pool_, parent.attention_);
}

Result<std::unique_ptr<Context>> Context::Grow(const ContextSpec& spec,
                                               std::vector<std::shared_ptr<const Segment>> chain,
                                               PagePool& pool, AttentionBackend& attention) {
  KV_RETURN_IF_ERROR(CheckSpec(spec));
  if (chain.size() >= limits::kSegmentsPerContextMax) {
    return ResourceExhausted("fork: a chain of " + std::to_string(chain.size()) +
                             " segments, the most there may be; fork an earlier context");
  }
  std::unique_ptr<Context> context(new Context(spec, pool, attention));
  context->chain_ = std::move(chain);
  const std::optional<SegmentEnds> ends = context->sealed_ends();
  context->tail_ =
      std::make_shared<Segment>(pool, PrivateSegment(spec, ends ? ends->tail_first : 0));
  if (context->chain_.empty()) return context;
  context->chain_.back()->VisitSlices([&](LayerId layer, KvHeadId head, const HeadSlice& slice) {
    context->tail_->slice(layer, head)->AdoptEnergy(slice);
  });
  return context;
}

std::unique_ptr<Context> Context::Restore(const ContextSpec& spec,
                                          std::vector<std::shared_ptr<const Segment>> chain,
                                          PagePool& pool, AttentionBackend& attention) {
  KV_CHECK(!chain.empty());
  std::unique_ptr<Context> context(new Context(spec, pool, attention));
  context->chain_ = std::move(chain);
  return context;
}

Result<HeadSlice*> Context::MutableSlice(LayerId layer, KvHeadId head) {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  if (!tail_) {
    return FailedPrecondition("context " + std::to_string(spec_.id.value) +
                              " is sealed; fork it to go on");
  }
  return tail_->slice(layer, head);
}

Status Context::CheckSlice(LayerId layer, KvHeadId head) const {
  if (layer.value >= spec_.shape.layers || head.value >= spec_.shape.kv_heads) {
    return InvalidArgument(SliceName(layer, head) + ": the context has " + spec_.shape.ToString());
  }
  if (const ShardId owner = ShardOf(layer, head, spec_.shape, spec_.shard_count);
      owner != spec_.shard) {
    return InvalidArgument(SliceName(layer, head) + " belongs to shard " +
                           std::to_string(owner.value) + ", this is shard " +
                           std::to_string(spec_.shard.value) + " of " +
                           std::to_string(spec_.shard_count));
  }
  return OkStatus();
}

Status Context::PutRows(LayerId layer, KvHeadId head, uint32_t first, uint32_t token_count,
                        std::span<const std::byte> k, std::span<const std::byte> v) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  KV_ASSIGN_OR_RETURN(const TokenRows rows, MakeRows(spec_.shape, token_count, k, v));
  return slice->PutRows(first, rows).WithContext(SliceName(layer, head));
}

Result<std::unique_ptr<SliceJob>> Context::PrepareBuild(LayerId layer, KvHeadId head,
                                                        uint32_t token_count,
                                                        std::span<const float> query_energy,
                                                        std::shared_ptr<const Packing> proposed) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  const uint32_t sinks = chain_.empty() ? spec_.sink_tokens : 0;
  Result<std::unique_ptr<SliceJob>> job =
      slice->PrepareBuild(token_count, sinks, spec_.window_tokens, query_energy,
                          std::move(proposed));
  if (!job.ok()) return job.status().WithContext(SliceName(layer, head));
  return job;
}

Result<std::unique_ptr<SliceJob>> Context::PrepareRecluster(LayerId layer, KvHeadId head) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  Result<std::unique_ptr<SliceJob>> job = slice->PrepareRecluster();
  if (!job.ok()) return job.status().WithContext(SliceName(layer, head));
  return job;
}

void Context::ObserveQueries(LayerId layer, KvHeadId head, const float* queries) {
  HeadSlice* slice = tail_ ? tail_->slice(layer, head) : nullptr;
  if (slice != nullptr) slice->ObserveQueries(queries, spec_.shape.group());
}

bool Context::WantsRecluster(LayerId layer, KvHeadId head) const {
  const HeadSlice* slice = tail_ ? tail_->slice(layer, head) : nullptr;
  return slice != nullptr && slice->wants_recluster();
}

Status Context::PrepareInstall(LayerId layer, KvHeadId head, SliceJob& job) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  return slice->PrepareInstall(job).WithContext(SliceName(layer, head));
}

Status Context::Install(LayerId layer, KvHeadId head, std::unique_ptr<SliceJob> job) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  return slice->Install(std::move(job)).WithContext(SliceName(layer, head));
}

Status Context::Append(LayerId layer, KvHeadId head, uint32_t first, uint32_t token_count,
                       std::span<const std::byte> k, std::span<const std::byte> v) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  KV_ASSIGN_OR_RETURN(const TokenRows rows, MakeRows(spec_.shape, token_count, k, v));
  return slice->Append(first, rows).WithContext(SliceName(layer, head));
}

Result<bool> Context::IndexPending(LayerId layer, KvHeadId head, uint32_t max_tokens) {
  KV_ASSIGN_OR_RETURN(HeadSlice * slice, MutableSlice(layer, head));
  Result<bool> more = slice->IndexPending(max_tokens);
  if (!more.ok()) return more.status().WithContext(SliceName(layer, head));
  return more;
}

Result<RowsView> Context::FetchRows(LayerId layer, KvHeadId head, wire::RowsPart part) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  if (part == wire::RowsPart::kSinks) {
    const Segment& first = chain_.empty() ? *tail_ : *chain_.front();
    return first.slice(layer, head)->sinks();
  }
  const Segment& last = chain_.empty() ? *tail_ : *chain_.back();
  return last.slice(layer, head)->tail();
}

Status Context::ReadRows(LayerId layer, KvHeadId head, const RowRange& range,
                         Misses* misses) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  return ReadChainRows(chain_, tail_.get(), layer, head, range, misses)
      .WithContext(SliceName(layer, head));
}

Status Context::Seal() {
  if (!tail_) return OkStatus();
  if (chain_.size() >= limits::kSegmentsPerContextMax) {
    return ResourceExhausted("seal: context " + std::to_string(spec_.id.value) +
                             " would be a chain of more than " +
                             std::to_string(limits::kSegmentsPerContextMax) + " segments");
  }
  if (AddedNothing()) {
    tail_.reset();
    return OkStatus();
  }
  KV_RETURN_IF_ERROR(tail_->Seal());
  chain_.push_back(std::move(tail_));
  tail_.reset();
  return OkStatus();
}

bool Context::AddedNothing() const {
  if (chain_.empty()) return false;
  uint32_t slices = 0, empty = 0;
  tail_->VisitSlices([&](LayerId, KvHeadId, const HeadSlice& slice) {
    ++slices;
    empty += slice.end() == tail_->spec().first_position ? 1 : 0;
  });
  return slices > 0 && empty == slices;
}

std::optional<SegmentEnds> Context::sealed_ends() const {
  return chain_.empty() ? std::nullopt : chain_.back()->ends();
}

Result<uint32_t> Context::NextPosition(LayerId layer, KvHeadId head) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  return (tail_ ? *tail_ : *chain_.back()).slice(layer, head)->next_append();
}

ContextUsage Context::usage() const {
  ContextUsage usage;
  const auto add = [&](const Segment& segment) {
    ++usage.segments;
    segment.VisitSlices([&](LayerId, KvHeadId, const HeadSlice& slice) {
      usage.tokens = std::max(usage.tokens, slice.end());
      usage.pages += slice.page_count();
      usage.indexed_tokens += slice.indexed_count();
      usage.pending_tokens += slice.pending_count();
    });
    usage.kv_bytes += segment.kv_bytes();
    usage.index_bytes += segment.index_bytes();
  };
  for (const auto& segment : chain_) add(*segment);
  if (tail_) {
    add(*tail_);
    usage.private_kv_bytes = tail_->kv_bytes();
  }
  return usage;
}

void Context::VisitPrivateSlices(const Segment::SliceVisitor& visit) const {
  if (tail_) tail_->VisitSlices(visit);
}

// A shard without slices may hold more links than the control plane counts (those of forks that added
// nothing); they go with the run.
bool Context::ReplaceLinks(std::vector<std::shared_ptr<const Segment>>* chain, SegmentId first,
                           SegmentId last, const std::shared_ptr<const Segment>& merged) {
  const auto is = [](SegmentId id) { return [id](const auto& segment) { return segment->id() == id; }; };
  const auto begin = std::find_if(chain->begin(), chain->end(), is(first));
  const auto end = std::find_if(begin, chain->end(), is(last));
  if (end == chain->end()) return false;
  *begin = merged;
  chain->erase(begin + 1, end + 1);
  return true;
}

Status Context::Validate() const {
  for (size_t i = 0; i < chain_.size(); ++i) {
    const Segment& segment = *chain_[i];
    if (!segment.sealed())
      return Internal("context: segment " + std::to_string(segment.id().value) +
                      " in a chain is not sealed");
    const Segment* next = i + 1 < chain_.size() ? chain_[i + 1].get() : tail_.get();
    if (next != nullptr && segment.ends() &&
        segment.ends()->tail_first != next->spec().first_position) {
      return Internal("context: segment " + std::to_string(next->id().value) +
                      " does not start at its parent's tail");
    }
    KV_RETURN_IF_ERROR(segment.Validate());
  }
  return tail_ ? tail_->Validate() : OkStatus();
}

}  // namespace icecache
