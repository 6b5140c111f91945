#include "cacheserver/context/slice_job.h"

#include <cstring>
#include <string>

namespace icecache {

namespace {

// A layout that is not a permutation would lose or double tokens for good, so it is checked before
// it is believed.
Status CheckLayout(const PageLayout& layout, uint32_t token_count) {
  const auto broken = [&](const std::string& what) {
    return Internal("page layout of a build: " + what);
  };
  if (token_count == 0 && layout.page_count() == 0) return OkStatus();
  if (layout.tokens.size() != token_count || layout.page_begin.empty() ||
      layout.page_begin.front() != 0 || layout.page_begin.back() != token_count) {
    return broken("covers " + std::to_string(layout.tokens.size()) + " of " +
                  std::to_string(token_count) + " tokens");
  }
  for (uint32_t p = 0; p < layout.page_count(); ++p) {
    const uint32_t begin = layout.page_begin[p], end = layout.page_begin[p + 1];
    if (begin >= end || end - begin > limits::kPageTokens) {
      return broken("page " + std::to_string(p) + " spans [" + std::to_string(begin) + ", " +
                    std::to_string(end) + ")");
    }
  }
  std::vector<bool> seen(token_count, false);
  for (uint32_t token : layout.tokens) {
    if (token >= token_count || seen[token])
      return broken("token " + std::to_string(token) + " twice or out of range");
    seen[token] = true;
  }
  return OkStatus();
}

}  // namespace

void SliceJob::Run() {
  KV_CHECK(!done_);
  if (kind_ == Kind::kRecluster) GatherSnapshot();
  const TokenRows rows = IndexRows();
  BuildHints hints;
  hints.query_energy = query_energy_;
  hints.seed = policy_options_.seed;
  Result<PageLayout> layout = policy_->Build(rows, hints);
  status_ = layout.ok() ? CheckLayout(*layout, token_count_) : layout.status();
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
  rows_->Extend(token_count_);
  for (size_t p = 0; p < snapshot_.size(); ++p) {
    for (uint32_t row = 0; row < snapshot_[p].fill; ++row) {
      const uint32_t index = snapshot_positions_[p][row] - first_position_;
      KV_CHECK(index < token_count_);
      std::memcpy(rows_->mutable_k(index), snapshot_[p].k + row * row_bytes, row_bytes);
      std::memcpy(rows_->mutable_v(index), snapshot_[p].v + row * row_bytes, row_bytes);
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
