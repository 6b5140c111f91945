#include "cacheserver/context/slice_job.h"

#include <cstring>
#include <string>

namespace icecache {

void SliceJob::Run() {
  KV_CHECK(!done_);
  GatherSnapshot();
  const TokenRows rows = IndexRows();
  BuildHints hints;
  hints.query_energy = query_energy_;
  hints.seed = policy_options_.seed;
  hints.proposed = proposed_.get();
  Result<PageLayout> layout = policy_->Build(rows, hints);
  status_ = layout.status();
  if (status_.ok()) {
    // A layout that is not a permutation would lose or double tokens for good.
    const Status sound = CheckLayout(*layout, token_count_);
    if (!sound.ok()) status_ = Internal("a build answers with a broken " + sound.message());
  }
  if (status_.ok()) {
    layout_ = std::move(*layout);
    table_->ReservePages(layout_.page_count());
    FillPages();
  }
  done_ = true;
}

// Rows of an index are consecutive positions, so sorting by position is one scatter. Policies get
// tokens in the order of the text, which is what a sequential layout needs.
void SliceJob::GatherSnapshot() {
  const size_t row_bytes = rows_->rows().row_bytes();
  for (size_t p = 0; p < snapshot_.size(); ++p) {
    for (uint32_t row = 0; row < snapshot_[p].fill; ++row) {
      const uint32_t index = snapshot_positions_[p][row] - first_position_;
      KV_CHECK(index < token_count_);
      const uint32_t to = first_row_ + index;
      std::memcpy(rows_->mutable_k(to), snapshot_[p].k + row * row_bytes, row_bytes);
      std::memcpy(rows_->mutable_v(to), snapshot_[p].v + row * row_bytes, row_bytes);
    }
  }
}

TokenRows SliceJob::IndexRows() const { return rows_->rows(first_row_, token_count_); }

void SliceJob::FillPages() {
  const TokenRows rows = IndexRows();
  const size_t row_bytes = rows.row_bytes();
  for (; pages_filled_ < layout_.page_count() && table_->spare_frames() > 0; ++pages_filled_) {
    const PageId page = table_->AddPage(version_);
    for (uint32_t i = layout_.page_begin[pages_filled_]; i < layout_.page_begin[pages_filled_ + 1];
         ++i) {
      const size_t token = layout_.tokens[i];
      table_->AppendRow(page, rows.k + token * row_bytes, rows.v + token * row_bytes,
                        first_position_ + layout_.tokens[i]);
    }
    table_->Commit(page);
  }
}

Status SliceJob::Complete() {
  if (const uint32_t missing = layout_.page_count() - pages_filled_; missing > 0) {
    KV_RETURN_IF_ERROR(table_->ReserveFrames(missing));
    FillPages();
  }
  table_->ReleaseSpares();
  return OkStatus();
}

}  // namespace icecache
