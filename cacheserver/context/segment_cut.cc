#include "cacheserver/context/segment_cut.h"

#include <utility>

namespace icecache {

SegmentCut::SegmentCut(PagePool& pool, std::vector<std::shared_ptr<const Segment>> chain,
                       size_t link, const SegmentSpec& spec, SegmentEnds ends)
    : chain_(std::move(chain)),
      link_(link),
      ends_(ends),
      segment_(std::make_shared<Segment>(pool, spec)) {
  KV_CHECK(link_ < chain_.size() && ends_.tail_first <= ends_.end);
}

Status SegmentCut::Step(Misses* misses) {
  const SegmentSpec& spec = segment_->spec();
  const uint32_t flat = segment_->flat_index(next_);
  const LayerId layer(static_cast<uint16_t>(flat / spec.shape.kv_heads));
  const KvHeadId head(static_cast<uint16_t>(flat % spec.shape.kv_heads));
  const uint32_t count = ends_.end - ends_.tail_first;
  std::vector<std::byte> k(count * spec.shape.row_bytes()), v(k.size());
  KV_RETURN_IF_ERROR(ReadChainRows(chain_, nullptr, layer, head,
                                   {ends_.tail_first, count, k.data(), v.data()}, misses));
  const HeadSlice& from = *chain_[link_]->slice(layer, head);
  if (!from.index_loaded()) {
    misses->slices.push_back({chain_[link_], layer, head, true, {}});
  } else if (std::vector<PageId> cold = from.table().ColdPages(); !cold.empty()) {
    misses->slices.push_back({chain_[link_], layer, head, false, std::move(cold)});
  }
  if (!misses->empty()) return OkStatus();
  const TokenRows tail{spec.shape.dtype, spec.shape.head_dim, count, k.data(), v.data()};
  KV_ASSIGN_OR_RETURN(
      std::unique_ptr<HeadSlice> slice,
      HeadSlice::Cut(from, Segment::OptionsOf(spec, flat), ends_.tail_first, tail));
  segment_->Adopt(next_++, std::move(slice));
  return OkStatus();
}

std::shared_ptr<const Segment> SegmentCut::Take() {
  KV_CHECK(done());
  const Status sealed = segment_->Seal();
  KV_CHECK(sealed.ok());
  return std::move(segment_);
}

}  // namespace icecache
