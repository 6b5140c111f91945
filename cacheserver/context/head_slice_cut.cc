// Reading a HeadSlice by position, and making a new one of its first tokens.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cacheserver/context/head_slice.h"

namespace icecache {
namespace {

// Copies those of `rows`, which lie at positions from `at` on, that are in [first, first + count).
void CopyPart(const TokenRows& rows, uint32_t at, uint32_t first, uint32_t count, std::byte* k,
              std::byte* v) {
  const uint32_t begin = std::max(at, first);
  const uint32_t end = std::min(at + rows.count, first + count);
  if (begin >= end) return;
  const size_t bytes = rows.row_bytes();
  std::memcpy(k + (begin - first) * bytes, rows.k + (begin - at) * bytes, (end - begin) * bytes);
  std::memcpy(v + (begin - first) * bytes, rows.v + (begin - at) * bytes, (end - begin) * bytes);
}

}  // namespace

bool HeadSlice::IndexOverlaps(uint32_t first, uint32_t count) const {
  const uint32_t begin = options_.first_position + sink_count();
  return begin < first + count && next_append_ - pending_.count() > first;
}

void HeadSlice::CopyRows(uint32_t first, uint32_t count, std::byte* k, std::byte* v) const {
  if (sinks_) CopyPart(sinks_->rows(), options_.first_position, first, count, k, v);
  CopyPart(pending_.rows(), next_append_ - pending_.count(), first, count, k, v);
  const RowsView tail_rows = tail();
  CopyPart(tail_rows.rows, tail_rows.first_position, first, count, k, v);
  if (!IndexOverlaps(first, count)) return;
  const PagedKv view = table_->view();
  const size_t bytes = view.row_bytes();
  for (uint32_t p = 0; p < view.page_count; ++p) {
    const uint32_t* positions = table_->positions(PageId(p));
    for (uint32_t row = 0; row < view.pages[p].fill; ++row) {
      if (positions[row] < first || positions[row] - first >= count) continue;
      const size_t to = (positions[row] - first) * bytes;
      std::memcpy(k + to, view.pages[p].k + row * bytes, bytes);
      std::memcpy(v + to, view.pages[p].v + row * bytes, bytes);
    }
  }
}

// The policy's own image, cut back: no row is clustered again.
Status HeadSlice::TakeIndexBefore(const HeadSlice& from, uint32_t end) {
  const PagedKv view = from.table_->view();
  std::vector<uint16_t> masks(view.page_count);
  uint32_t pages = 0;
  for (uint32_t p = 0; p < view.page_count; ++p) {
    const uint32_t* positions = from.table_->positions(PageId(p));
    for (uint32_t row = 0; row < view.pages[p].fill; ++row) {
      if (positions[row] < end) masks[p] = static_cast<uint16_t>(masks[p] | 1u << row);
    }
    pages += masks[p] != 0 ? 1 : 0;
  }
  if (pages == 0) return OkStatus();
  KV_RETURN_IF_ERROR(table_->ReserveFrames(pages));
  std::string image;
  from.policy_->Save(&image);
  std::unique_ptr<SelectionPolicy> policy = NewPolicy();
  KV_RETURN_IF_ERROR(policy->Restore(image));
  KV_RETURN_IF_ERROR(policy->Retain(masks, view));
  for (uint32_t p = 0; p < view.page_count; ++p) {
    if (masks[p] == 0) continue;
    const PageId page = table_->AddPage(next_version_++);
    const uint32_t* positions = from.table_->positions(PageId(p));
    for (uint32_t row = 0; row < view.pages[p].fill; ++row) {
      if ((masks[p] >> row & 1) == 0) continue;
      table_->AppendRow(page, view.pages[p].k + row * view.row_bytes(),
                        view.pages[p].v + row * view.row_bytes(), positions[row]);
    }
    table_->Commit(page);
  }
  table_->ReleaseSpares();
  policy_ = std::move(policy);
  return OkStatus();
}

Result<std::unique_ptr<HeadSlice>> HeadSlice::Cut(const HeadSlice& from,
                                                  const SliceOptions& options,
                                                  uint32_t tail_first, const TokenRows& tail) {
  KV_CHECK(from.sealed_ && from.index_loaded_ && options.policy == from.options_.policy);
  KV_CHECK(options.first_position == from.options_.first_position);
  KV_CHECK(tail_first >= options.first_position && tail_first <= from.next_append_);
  // Asking for frames may evict, but not what is about to be copied.
  const PageHold held(from.table());
  auto slice = std::make_unique<HeadSlice>(from.pool_, options);
  const uint32_t sinks = std::min(from.sink_count(), tail_first - options.first_position);
  if (sinks > 0) {
    slice->sinks_ = slice->NewRows();
    KV_RETURN_IF_ERROR(slice->sinks_->Reserve(sinks, true));
    KV_RETURN_IF_ERROR(slice->sinks_->Write(0, from.sinks_->rows(0, sinks)));
  }
  KV_RETURN_IF_ERROR(slice->TakeIndexBefore(from, tail_first));
  if (tail.count > 0) {
    slice->tail_ = slice->NewRows();
    KV_RETURN_IF_ERROR(slice->tail_->Reserve(tail.count, true));
    KV_RETURN_IF_ERROR(slice->tail_->Write(0, tail));
  }
  slice->AdoptEnergy(from);
  slice->tail_first_ = slice->next_append_ = tail_first;
  if (from.built()) slice->built_count_ = slice->end() - options.first_position;
  slice->sealed_ = true;
  return slice;
}

}  // namespace icecache
