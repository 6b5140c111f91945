// SliceJob: the clustering of one head slice, made to run away from the slice's thread.
//
//   1. HeadSlice::PrepareBuild | PrepareMerge | PrepareRecluster   owner's thread: takes the snapshot, sets memory
//   aside
//   2. Run                                          any thread, once; touches neither slice nor
//   pool
//   3. HeadSlice::Install                           owner's thread: swaps the result in
// A job that is never installed is destroyed on the owner's thread (it gives memory back); the
// slice may be gone by then.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "cacheserver/store/page_table.h"
#include "cacheserver/store/row_buffer.h"

namespace icecache {

class SliceJob {
 public:
  SliceJob(const SliceJob&) = delete;
  SliceJob& operator=(const SliceJob&) = delete;
  ~SliceJob() = default;

  void Run();
  bool done() const { return done_; }
  // OK, or why Run failed (non-finite rows are refused at the door, so a failure is INTERNAL).
  const Status& status() const { return status_; }
  uint32_t token_count() const { return token_count_; }
  uint32_t page_count() const { return layout_.page_count(); }

 private:
  friend class HeadSlice;
  enum class Kind : uint8_t { kBuild, kRecluster };
  SliceJob() = default;

  void GatherSnapshot();
  TokenRows IndexRows() const;
  void FillPages();   // as far as spare frames reach
  Status Complete();  // owner's thread: the pages that found no frame set aside

  Kind kind_ = Kind::kBuild;
  uint64_t generation_ = 0;  // Install refuses a job of another generation of the slice
  PolicyOptions policy_options_;
  std::vector<float> query_energy_;
  std::shared_ptr<const Packing> proposed_;  // kBuild: a layout to consider, or none
  uint32_t token_count_ = 0;         // rows to cluster
  uint32_t first_position_ = 0;      // of the first of them
  uint32_t first_row_ = 0;           // its row in rows_
  uint32_t staged_count_ = 0;        // kBuild: all rows of the segment, sinks and tail included
  uint32_t version_ = 0;             // of every page of the result
  std::shared_ptr<RowBuffer> rows_;  // the staged rows, or room to gather the snapshot into
  std::vector<PageView> snapshot_;   // pages as they stood: of the slice, or of those to merge
  std::vector<const uint32_t*> snapshot_positions_;
  std::shared_ptr<const void> pin_;  // keeps the snapshot's frames

  bool done_ = false;
  Status status_;
  std::unique_ptr<SelectionPolicy> policy_;  // empty until Run
  std::unique_ptr<PageTable> table_;         // holds the spare frames until Run
  PageLayout layout_;
  uint32_t pages_filled_ = 0;
  // kBuild, by PrepareInstall: what stays as rows.
  std::shared_ptr<RowBuffer> sinks_, tail_;
};

}  // namespace icecache
