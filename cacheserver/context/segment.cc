#include "cacheserver/context/segment.h"

#include <string>

namespace icecache {

namespace {

std::string SliceName(LayerId layer, KvHeadId head) {
  return "layer " + std::to_string(layer.value) + " kv head " + std::to_string(head.value);
}

}  // namespace

SliceOptions Segment::OptionsOf(const SegmentSpec& spec, uint32_t flat_index) {
  SliceOptions options;
  options.segment = spec.id;
  options.first_position = spec.first_position;
  options.tenant = spec.tenant;
  options.dtype = spec.shape.dtype;
  options.head_dim = spec.shape.head_dim;
  options.policy = spec.policy;
  options.seed = SliceSeed(spec.seed, flat_index);
  return options;
}

Segment::Segment(PagePool& pool, const SegmentSpec& spec) : spec_(spec) {
  KV_CHECK(spec.shard_count > 0 && spec.shard.value < spec.shard_count);
  const uint32_t total = spec.shape.layers * spec.shape.kv_heads;
  for (uint32_t flat = spec.shard.value; flat < total; flat += spec.shard_count) {
    slices_.push_back(std::make_unique<HeadSlice>(pool, OptionsOf(spec, flat)));
  }
}

Result<std::shared_ptr<Segment>> Segment::Restore(PagePool& pool, const SegmentSpec& spec,
                                                  std::optional<SegmentEnds> ends,
                                                  std::span<const std::string> rows) {
  auto segment = std::make_shared<Segment>(pool, spec);
  KV_CHECK(rows.size() == size_t{spec.shape.layers} * spec.shape.kv_heads);
  for (size_t i = 0; i < segment->slices_.size(); ++i) {
    const auto flat = static_cast<uint32_t>(i * spec.shard_count + spec.shard.value);
    const std::string where = "segment " + std::to_string(spec.id.value) + " slice " +
                              std::to_string(flat);
    Result<std::unique_ptr<HeadSlice>> slice =
        HeadSlice::Restore(pool, OptionsOf(spec, flat), rows[flat]);
    if (!slice.ok()) return slice.status().WithContext(where);
    if (ends && (*slice)->next_append() != ends->tail_first) {
      return DataLoss(where + " ends at token " + std::to_string((*slice)->next_append()) +
                      ", its segment at " + std::to_string(ends->tail_first));
    }
    segment->slices_[i] = std::move(*slice);
  }
  if (!segment->slices_.empty()) segment->ends_ = ends;
  segment->sealed_ = true;
  return segment;
}

// The inverse of ShardOf: slices go round the shards in (layer, head) order.
std::optional<size_t> Segment::IndexOf(LayerId layer, KvHeadId head) const {
  if (layer.value >= spec_.shape.layers || head.value >= spec_.shape.kv_heads) return std::nullopt;
  if (ShardOf(layer, head, spec_.shape, spec_.shard_count) != spec_.shard) return std::nullopt;
  return (size_t{layer.value} * spec_.shape.kv_heads + head.value) / spec_.shard_count;
}

HeadSlice* Segment::slice(LayerId layer, KvHeadId head) {
  const std::optional<size_t> index = IndexOf(layer, head);
  return index ? slices_[*index].get() : nullptr;
}

const HeadSlice* Segment::slice(LayerId layer, KvHeadId head) const {
  const std::optional<size_t> index = IndexOf(layer, head);
  return index ? slices_[*index].get() : nullptr;
}

void Segment::VisitSlices(const SliceVisitor& visit) const {
  for (size_t i = 0; i < slices_.size(); ++i) {
    const size_t flat = i * spec_.shard_count + spec_.shard.value;
    visit(LayerId(static_cast<uint16_t>(flat / spec_.shape.kv_heads)),
          KvHeadId(static_cast<uint16_t>(flat % spec_.shape.kv_heads)), *slices_[i]);
  }
}

Status Segment::CheckSealable() const {
  Status status;
  const HeadSlice* first = nullptr;
  VisitSlices([&](LayerId layer, KvHeadId head, const HeadSlice& slice) {
    if (!status.ok()) return;
    if (first == nullptr) first = &slice;
    if (slice.building()) {
      status = FailedPrecondition("seal: " + SliceName(layer, head) +
                                  " is being built; wait for the answer to Build");
    } else if (slice.next_append() != first->next_append() || slice.end() != first->end()) {
      status = FailedPrecondition(
          "seal: " + SliceName(layer, head) + " is indexed to position " +
          std::to_string(slice.next_append()) + " and holds rows to " +
          std::to_string(slice.end()) + ", the first slice of the shard to " +
          std::to_string(first->next_append()) + " and " + std::to_string(first->end()) +
          "; send the missing rows of every layer");
    } else if (slice.end() - slice.next_append() > limits::kWindowTokensMax) {
      status = FailedPrecondition("seal: " + SliceName(layer, head) + " has " +
                                  std::to_string(slice.end() - slice.next_append()) +
                                  " rows that are not indexed, a window holds at most " +
                                  std::to_string(limits::kWindowTokensMax) + "; send Build first");
    }
  });
  return status;
}

Status Segment::Seal() {
  if (sealed_) return OkStatus();
  KV_RETURN_IF_ERROR(CheckSealable());
  // Indexing what is pending may run out of memory and changes nothing that a query sees; the rest
  // cannot fail half-way for want of frames.
  for (const auto& slice : slices_) {
    if (slice->sealed()) continue;
    KV_RETURN_IF_ERROR(slice->IndexPending(slice->pending_count()).status());
  }
  for (const auto& slice : slices_) {
    const Status status = slice->Seal();
    KV_CHECK(status.ok());
  }
  if (!slices_.empty()) ends_ = SegmentEnds{slices_[0]->next_append(), slices_[0]->end()};
  sealed_ = true;
  return OkStatus();
}

uint64_t Segment::kv_bytes() const {
  uint64_t bytes = 0;
  for (const auto& slice : slices_) bytes += slice->kv_bytes();
  return bytes;
}

uint64_t Segment::index_bytes() const {
  uint64_t bytes = 0;
  for (const auto& slice : slices_) bytes += slice->index_bytes();
  return bytes;
}

Status Segment::Validate() const {
  Status status;
  VisitSlices([&](LayerId layer, KvHeadId head, const HeadSlice& slice) {
    if (status.ok()) {
      status = slice.Validate().WithContext("segment " + std::to_string(spec_.id.value) + " " +
                                            SliceName(layer, head));
    }
  });
  return status;
}

}  // namespace icecache
