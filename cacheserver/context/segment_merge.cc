#include "cacheserver/context/segment_merge.h"

#include <utility>

namespace icecache {
namespace {

SegmentSpec SpecOf(const Segment& first, SegmentId merged) {
  SegmentSpec spec = first.spec();
  spec.id = merged;
  return spec;
}

}  // namespace

SegmentMerge::SegmentMerge(PagePool& pool, std::vector<std::shared_ptr<const Segment>> run,
                           SegmentId merged)
    : run_(std::move(run)),
      segment_(std::make_shared<Segment>(pool, SpecOf(*run_.front(), merged))) {
  for (size_t i = 1; i < run_.size(); ++i) {
    const SegmentSpec &before = run_[i - 1]->spec(), &spec = run_[i]->spec();
    KV_CHECK(run_[i]->sealed() && spec.tenant == before.tenant && spec.shape == before.shape &&
             spec.policy == before.policy && spec.seed == before.seed);
    KV_CHECK(!run_[i - 1]->ends() || run_[i - 1]->ends()->tail_first == spec.first_position);
  }
}

Result<std::unique_ptr<SliceJob>> SegmentMerge::Prepare(Misses* misses) {
  const uint32_t flat = segment_->flat_index(next_);
  const uint32_t kv_heads = segment_->spec().shape.kv_heads;
  const LayerId layer(static_cast<uint16_t>(flat / kv_heads));
  const KvHeadId head(static_cast<uint16_t>(flat % kv_heads));
  std::vector<const HeadSlice*> from;
  for (const std::shared_ptr<const Segment>& segment : run_) {
    const HeadSlice& slice = *from.emplace_back(segment->slice(layer, head));
    if (!slice.index_loaded()) {
      misses->slices.push_back({segment, layer, head, true, {}});
    } else if (std::vector<PageId> cold = slice.table().ColdPages(); !cold.empty()) {
      misses->slices.push_back({segment, layer, head, false, std::move(cold)});
    }
  }
  if (!misses->empty()) return std::unique_ptr<SliceJob>();
  return segment_->slice(layer, head)->PrepareMerge(from);
}

Status SegmentMerge::Install(std::unique_ptr<SliceJob> job) {
  KV_RETURN_IF_ERROR(segment_->stored_slice(next_).Install(std::move(job)));
  ++next_;
  return OkStatus();
}

std::shared_ptr<const Segment> SegmentMerge::Take() {
  KV_CHECK(done());
  const Status sealed = segment_->Seal();
  KV_CHECK(sealed.ok());
  // What stands behind it in a chain begins where the run ended.
  KV_CHECK(segment_->ends() == run_.back()->ends());
  return std::move(segment_);
}

uint64_t SegmentMerge::kv_bytes() const {
  const std::optional<SegmentEnds> ends = run_.back()->ends();
  if (!ends) return 0;
  return uint64_t{ends->end - spec().first_position} * 2 * spec().shape.row_bytes() *
         segment_->slice_count();
}

}  // namespace icecache
