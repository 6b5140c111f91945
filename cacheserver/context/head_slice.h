// HeadSlice: all tokens of one (segment, layer, kv head). Joins the pages (store) with the policy
// that chooses among them (select), and holds what is not indexed.
//
// Every token of the slice is in exactly one place (docs/protocol.md): with first = the segment's
// first position,
//   sinks    [first, first + sink_count)         plain rows; set by Build, in a chain's first
//   segment only index    from there, in pages                clustered pending  up to
//   next_append()                 appended, not yet indexed tail     [next_append(), end())
//   unindexed rows: staged prefill before Build, window at Seal
//
// Lifecycle: PutRows* -> PrepareBuild/Run/Install -> (Append | Select | IndexPending | recluster)*
// -> PutRows (window) -> Seal. Build may be left out (a fork that only decodes). After Seal only
// const members may be called. Rows are checked finite at the door.
//
// A sealed slice has a stored form (head_slice_store.cc): SaveRows, SaveIndex and its pages. Restore
// brings it back with its rows alone; until AdoptIndex has given it its index, index_loaded() is
// false and Select may not be called. Pages of a stored slice come and go through table().
// Thread: the shard's; Save... of a sealed slice on any thread while its pages stay.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cacheserver/context/slice_job.h"
#include "cacheserver/context/slice_parts.h"
#include "cacheserver/select/query_energy.h"
#include "cacheserver/select/selection_policy.h"
#include "cacheserver/store/page_table.h"
#include "cacheserver/store/row_buffer.h"
#include "common/ids.h"
#include "common/status.h"
#include "kernels/attention.h"

namespace icecache {

class HeadSlice {
 public:
  HeadSlice(PagePool& pool, const SliceOptions& options);
  HeadSlice(const HeadSlice&) = delete;
  HeadSlice& operator=(const HeadSlice&) = delete;

  // Replaces the tail from position `first` on. OUT_OF_RANGE for a gap or a position that is
  // indexed already; INVALID_ARGUMENT for non-finite values; RESOURCE_EXHAUSTED: memory or quota;
  // FAILED_PRECONDITION while a build runs. On failure nothing has changed.
  Status PutRows(uint32_t first, const TokenRows& rows);

  // Splits `token_count` staged rows into sinks, index and tail. nullptr: this very build stands
  // already. FAILED_PRECONDITION when rows are missing or the slice has an index;
  // RESOURCE_EXHAUSTED; INVALID_ARGUMENT when `proposed` (BuildHints, or null) is no layout of the
  // rows to index. Memory: the index exists twice (staged rows and pages) until Install.
  Result<std::unique_ptr<SliceJob>> PrepareBuild(uint32_t token_count, uint32_t sink_tokens,
                                                 uint32_t window_tokens,
                                                 std::span<const float> query_energy,
                                                 std::shared_ptr<const Packing> proposed = nullptr);
  // A build of an empty slice from the tokens of sealed ones that join, oldest first, all in memory:
  // sinks of the first, tail of the last, and what they have indexed clustered anew, as PrepareBuild
  // would those rows. RESOURCE_EXHAUSTED; INTERNAL: they do not join.
  Result<std::unique_ptr<SliceJob>> PrepareMerge(std::span<const HeadSlice* const> from);
  // Re-clusters the index from a snapshot, for queries such as ObserveQueries has seen; queries and
  // appends go on meanwhile. Same errors.
  Result<std::unique_ptr<SliceJob>> PrepareRecluster();
  bool wants_recluster()
      const;  // limits::kReclusterTokens came since the last clustering, and no job runs
  // Takes the result of a job that has run. CANCELLED when the slice was sealed meanwhile;
  // RESOURCE_EXHAUSTED. On failure the slice is as before, and Prepare may be called again. Always
  // ends the job.
  Status Install(std::unique_ptr<SliceJob> job);
  // Reserves what Install of a job that has run needs: a layout may take more pages than were set
  // aside. RESOURCE_EXHAUSTED: the job stays as it is, and this may be called again when there is
  // room.
  Status PrepareInstall(SliceJob& job);
  void AbandonJob();  // the running job was dropped without Install

  // What a Select asked, [group, head_dim]: the next clustering is for such queries.
  void ObserveQueries(const float* queries, uint32_t group) {
    energy_.Observe(queries, group, options_.head_dim);
  }
  // A fork's slice starts with what its parent's has seen.
  void AdoptEnergy(const HeadSlice& parent) { energy_ = parent.energy_; }

  // Rows that left a worker's window, as pending. Rows before next_append() are ignored (a repeated
  // request); OUT_OF_RANGE for a gap. At most kPendingTokensMax a call; when there is no room,
  // older ones are indexed first.
  Status Append(uint32_t first, const TokenRows& rows);
  // Indexes at most max_tokens of the pending rows, oldest first. True: more are left.
  Result<bool> IndexPending(uint32_t max_tokens);

  // Indexes what is pending and makes the slice immutable. The tail must hold at most
  // kWindowTokensMax rows (FAILED_PRECONDITION: Build is missing). Harmless when sealed.
  Status Seal();

  // A sealed slice with the tokens of `from` (sealed, all in memory) before `tail_first`, indexed as
  // they are there, and `tail` behind them: a copy. RESOURCE_EXHAUSTED.
  static Result<std::unique_ptr<HeadSlice>> Cut(const HeadSlice& from, const SliceOptions& options,
                                                uint32_t tail_first, const TokenRows& tail);

  // The stored form. REQUIRES: sealed (and index_loaded() for the index).
  std::string SaveRows() const;
  std::string SaveIndex() const;
  // A sealed slice without its index. DATA_LOSS, FAILED_PRECONDITION (newer format),
  // RESOURCE_EXHAUSTED.
  static Result<std::unique_ptr<HeadSlice>> Restore(PagePool& pool, const SliceOptions& options,
                                                    std::string_view rows);
  static Result<SliceIndex> ParseIndex(const SliceOptions& options, std::string_view blob);
  // All pages are cold then. DATA_LOSS when it does not fit the slice. Harmless when repeated.
  Status AdoptIndex(SliceIndex index);
  bool index_loaded() const { return index_loaded_; }
  PageTable& table() const { return *table_; }  // residency, holds and the clock's bits
  const SliceOptions& options() const { return options_; }

  // Best pages of the index, and the residual of everything indexed or pending that is in none of
  // them (empty when !request.residual). `attention` is the calling thread's.
  void Select(const SelectRequest& request, AttentionBackend& attention, Selection* out) const;
  // Whether the page stands under this version, in memory or not.
  bool HasPage(PageId page, uint32_t version) const;
  PageContent page(PageId page) const { return table_->content(page); }
  PagedKv pages() const { return table_->view(); }
  // Pages of the index that hold any of these positions, each once, ascending.
  void PagesAt(std::span<const uint32_t> positions, std::vector<PageId>* pages) const;

  // Copies what it holds of positions [first, first + count) into rows of the whole range.
  // REQUIRES: where IndexOverlaps, all pages in memory.
  void CopyRows(uint32_t first, uint32_t count, std::byte* k, std::byte* v) const;
  bool IndexOverlaps(uint32_t first, uint32_t count) const;

  RowsView sinks() const;
  RowsView tail() const;

  bool sealed() const { return sealed_; }
  bool built() const { return built_count_.has_value(); }
  bool job_running() const { return job_ != Job::kNone; }
  bool building() const { return job_ == Job::kBuild; }
  uint32_t sink_count() const { return sinks_ ? sinks_->count() : 0; }
  uint32_t pending_count() const { return pending_.count(); }
  TokenRows pending() const { return pending_.rows(); }
  uint64_t indexed_count() const {
    return index_loaded_ ? table_->token_count()
                         : next_append_ - options_.first_position - sink_count();
  }
  uint32_t page_count() const { return table_->page_count(); }
  uint32_t next_append() const { return next_append_; }
  uint32_t end() const;          // after the last row held
  uint64_t kv_bytes() const;     // frames and row buffers held
  uint64_t index_bytes() const;  // the policy's own figure; walks its counters
  void VisitCounters(const SelectionPolicy::CounterVisitor& visit) const;
  // Reads every page that is in memory. DATA_LOSS names the first whose checksum differs.
  Status VerifyPages() const { return table_->Validate(); }
  Residency residency(PageId page) const { return table_->residency(page); }

  Status Validate() const;  // slow; INTERNAL naming the first broken invariant

 private:
  enum class Job : uint8_t { kNone, kBuild, kRecluster };

  std::unique_ptr<SelectionPolicy> NewPolicy() const;
  std::unique_ptr<PageTable> NewTable() const;
  std::shared_ptr<RowBuffer> NewRows() const;
  Status CheckRows(uint32_t first, const TokenRows& rows) const;
  Status CheckMutable(const char* what) const;
  uint32_t live_tail_first() const;
  Status OwnTail();
  Result<std::unique_ptr<SliceJob>> NewJob(SliceJob::Kind kind, uint32_t token_count,
                                           std::span<const float> query_energy);
  void AddSnapshot(SliceJob& job) const;
  void InstallBuild(SliceJob& job);
  Status CatchUp(SliceJob& job);
  Status EnsurePolicy();
  Status TakeIndexBefore(const HeadSlice& from, uint32_t end);
  Status InsertRow(SelectionPolicy& policy, PageTable& table, const TokenRows& row,
                   uint32_t position);

  PagePool& pool_;
  const SliceOptions options_;

  std::shared_ptr<RowBuffer> sinks_;         // never changed once set
  std::unique_ptr<SelectionPolicy> policy_;  // nullptr until something is indexed
  std::unique_ptr<PageTable> table_;
  QueryEnergy energy_;               // of the build and of queries since
  RowBuffer pending_;                // positions [next_append_ - count, next_append_)
  std::shared_ptr<RowBuffer> tail_;  // cloned before a change when a reply or job holds it
  uint32_t tail_first_ = 0;          // position of tail_'s row 0; rows before next_append_ are dead
  uint32_t next_append_ = 0;
  std::optional<uint32_t> built_count_;
  uint32_t next_version_ = 1;  // never falls: old names of pages never match again
  uint64_t inserts_since_build_ = 0;
  uint64_t generation_ = 0;  // a job of an earlier one is out of date
  Job job_ = Job::kNone;
  bool sealed_ = false;
  bool index_loaded_ = true;
};

}  // namespace icecache
