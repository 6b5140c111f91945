// SliceJob: the clustering of one head slice, made to run away from the slice's thread.
//
//   1. HeadSlice::PrepareBuild | PrepareRecluster   owner's thread: takes the snapshot, sets memory
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

 private:
  friend class HeadSlice;
  enum class Kind : uint8_t { kBuild, kRecluster };
  SliceJob() = default;

  void GatherSnapshot();
  TokenRows IndexRows() const;
  void FillPages();  // as far as spare frames reach

  Kind kind_ = Kind::kBuild;
  uint64_t slice_generation_ = 0;  // Install refuses a job of another generation
  PolicyKind policy_kind_ = PolicyKind::kClusterTree;
  PolicyOptions policy_options_;
  std::vector<float> query_energy_;
  uint32_t token_count_ = 0;         // rows to cluster
  uint32_t first_position_ = 0;      // of row 0 (kBuild)
  uint32_t sink_count_ = 0;          // kBuild: rows of rows_ before the first to index
  uint32_t built_count_ = 0;         // kBuild: all rows of the segment
  std::shared_ptr<RowBuffer> rows_;  // kBuild: the staged rows. kRecluster: room to gather into
  std::vector<uint32_t> positions_;  // kRecluster: of each row gathered
  std::vector<PageView> snapshot_;   // kRecluster: pages as they stood
  std::vector<const uint32_t*> snapshot_positions_;
  std::shared_ptr<const void> pin_;  // keeps the snapshot's frames
  uint32_t version_ = 0;             // of every page of the result

  bool done_ = false;
  Status status_;
  std::unique_ptr<SelectionPolicy> policy_;
  std::unique_ptr<PageTable> table_;
  PageLayout layout_;
  uint32_t pages_filled_ =
      0;  // Install adds the rest when the layout needs more frames than were set aside
};

}  // namespace icecache
