// ArrivalPolicy: what the peers' policies share. Pages are in order of arrival, each has a record
// of a fixed number of bytes, the slice has some floats; a policy says what they mean and how to
// rank.
//
// Two kinds of record. A page record summarises the rows of its page (a bounding box, a mean): it
// is computed again whenever the page changes, so it is always that of the rows stored. A token
// record is 16 cells, one per row, written once when the token comes and moved with it (a code, a
// cluster, an observed score). "Slot" below is 16 * page + row: where a token's cell is.
//
// Build, Insert, Retain, Save, Restore and Validate are final here; so an image is bounds-checked
// once for all. Select is the policy's, usually by budget_choice.h. Thread and lifecycle: as
// SelectionPolicy says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/select/page_fills.h"
#include "cacheserver/select/selection_policy.h"
#include "common/limits.h"

namespace icecache {

class ArrivalPolicy : public SelectionPolicy {
 public:
  Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints) final;
  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages) final;
  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) final;
  void Save(std::string* image) const final;
  Status Restore(std::string_view image) final;
  Status Validate(const PagedKv& pages) const final;
  void VisitCounters(const CounterVisitor& visit) const override;

 protected:
  // One of the two sizes is 0; both: no records.
  struct RecordBytes {
    size_t page = 0;
    size_t token = 0;
  };
  ArrivalPolicy(PolicyKind kind, const PolicyOptions& options, RecordBytes bytes);

  // Hooks. Those with defaults are for policies that have nothing to say.
  // Sets shared() from the rows of the build, before any record is made.
  virtual void Learn(const TokenRows&, const BuildHints&) {}
  // Page records: the record of a page that holds these rows. Same rows, same bytes.
  virtual void Summarise(const TokenRows&, uint8_t*) const {}
  // Token records: the cells of rows.count tokens that were just added (all of a build, or one).
  virtual void Encode(const TokenRows&, const BuildHints&, uint8_t*) {}
  // Token records, after Retain: makes shared() agree with the tokens that are left. `kept` shows
  // their rows in the new pages.
  virtual void Kept(const PagedKv&) {}
  // What is wrong with a restored state, or an empty text. Sizes of records are checked already.
  virtual std::string Wrong() const { return {}; }

  const PolicyOptions& options() const { return options_; }
  uint32_t page_count() const { return fills_.page_count(); }
  uint32_t tokens() const { return fills_.tokens(); }
  uint32_t fill(uint32_t page) const { return fills_.fill(page); }
  uint32_t slots() const { return page_count() * limits::kPageTokens; }
  // Records of consecutive pages (or cells of consecutive slots) follow each other.
  template <typename T>
  const T* records() const {
    return reinterpret_cast<const T*>(records_.data());
  }
  std::vector<float>& shared() { return shared_; }
  const std::vector<float>& shared() const { return shared_; }

  // Empties the answer and sets its shape. False when there is nothing to choose from.
  bool Start(const SelectRequest& request, const PagedKv& kv, Selection* out) const;

 private:
  size_t page_stride() const { return bytes_.page + limits::kPageTokens * bytes_.token; }
  uint8_t* record(uint32_t page) { return records_.data() + page * page_stride(); }
  void KeepCells(std::span<const uint16_t> keep_masks);
  void KeepPages(std::span<const uint16_t> keep_masks, const PagedKv& pages);
  Status RowsInMemory(const PagedKv& pages, std::span<const uint16_t> keep_masks) const;

  const PolicyKind kind_;
  const PolicyOptions options_;
  const RecordBytes bytes_;
  PageFills fills_;
  std::vector<uint8_t> records_;  // [pages][page_stride()]
  std::vector<float> shared_;
};

// Copies the rows of a page whose bit is set behind each other. REQUIRES: the page is in memory.
class RowGather {
 public:
  explicit RowGather(const PolicyOptions& options) : options_(options) {}
  void Clear() { k_.clear(), v_.clear(); }
  void AddPage(const PageView& page, uint32_t mask);
  void AddRow(const TokenRows& row);
  TokenRows rows() const;

 private:
  const PolicyOptions& options_;
  std::vector<std::byte> k_, v_;
};

}  // namespace icecache
