// Building a HeadSlice from sealed ones.
#include <cstring>
#include <deque>
#include <string>
#include <utility>

#include "cacheserver/context/head_slice.h"

namespace icecache {
namespace {

void CopyTo(RowBuffer& to, uint32_t first, const TokenRows& rows) {
  const size_t bytes = rows.count * rows.row_bytes();
  if (bytes == 0) return;
  std::memcpy(to.mutable_k(first), rows.k, bytes);
  std::memcpy(to.mutable_v(first), rows.v, bytes);
}

}  // namespace

// The pages as they stand; the job reads them on its own thread, under a pin.
void HeadSlice::AddSnapshot(SliceJob& job) const {
  const PagedKv view = table_->view();
  job.snapshot_.insert(job.snapshot_.end(), view.pages, view.pages + view.page_count);
  for (uint32_t p = 0; p < view.page_count; ++p)
    job.snapshot_positions_.push_back(table_->positions(PageId(p)));
}

Result<std::unique_ptr<SliceJob>> HeadSlice::PrepareMerge(std::span<const HeadSlice* const> from) {
  KV_CHECK(!from.empty() && !built_count_ && job_ == Job::kNone &&
           end() == options_.first_position);
  const HeadSlice& last = *from.back();
  const RowsView sinks = from.front()->sinks(), tail = last.tail();
  const uint32_t sink_count = sinks.rows.count;
  KV_CHECK(last.next_append_ >= options_.first_position + sink_count);
  const uint32_t indexed = last.next_append_ - options_.first_position - sink_count;
  uint64_t found = 0;
  // Asking for frames may evict, but not what is about to be read: after this, the pin keeps it.
  std::deque<PageHold> held;
  for (const HeadSlice* slice : from) {
    held.emplace_back(slice->table());
    KV_CHECK(slice->sealed_ && slice->index_loaded_ && slice->table_->ColdPages().empty());
    found += slice->table_->token_count();
  }
  if (found != indexed || from.front()->options_.first_position != options_.first_position) {
    return Internal("merge: the segments hold " + std::to_string(found) + " indexed rows, " +
                    std::to_string(indexed) + " lie between the first and the last");
  }
  KV_ASSIGN_OR_RETURN(std::unique_ptr<SliceJob> job,
                      NewJob(SliceJob::Kind::kBuild, indexed, last.energy_.value()));
  job->staged_count_ = sink_count + indexed + tail.rows.count;
  job->first_position_ = options_.first_position + sink_count;
  job->first_row_ = sink_count;
  job->rows_ = NewRows();
  KV_RETURN_IF_ERROR(job->rows_->Reserve(job->staged_count_, true));
  job->rows_->Extend(job->staged_count_);
  CopyTo(*job->rows_, 0, sinks.rows);
  CopyTo(*job->rows_, sink_count + indexed, tail.rows);
  for (const HeadSlice* slice : from) slice->AddSnapshot(*job);
  job->pin_ = pool_.Pin();
  job->version_ = next_version_++;
  AdoptEnergy(last);
  job_ = Job::kBuild;
  return job;
}

}  // namespace icecache
