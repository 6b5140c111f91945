// The class behind dci_tree.h, shared by dci_tree_{build,insert,search,image}.cc.
//
// Tokens are numbered in order of arrival. Lengths are in units of lift_ = the largest key norm, so
// that every lifted key [k / lift, sqrt(1 - |k|^2 / lift^2)] lies on the unit sphere whatever the
// keys' scale.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/select/dci_tree.h"
#include "cacheserver/select/selection_policy.h"
#include "common/limits.h"

namespace icecache {

class DciTree final : public SelectionPolicy {
 public:
  DciTree(const PolicyOptions& options, const DciTreeOptions& tree_options);

  Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints) override;
  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages) override;
  void Select(const SelectRequest& request, const PagedKv& pages, Selection* out) const override;
  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) override;
  void Save(std::string* image) const override;
  Status Restore(std::string_view image) override;
  Status Validate(const PagedKv& pages) const override;
  void VisitCounters(const CounterVisitor& visit) const override;

 private:
  static constexpr uint32_t kRoot = ~0u;  // parent of tokens on the top level
  static constexpr uint32_t kLevelsMax =
      32;  // a level has a multiple of the tokens of the one above

  struct Child {
    float projection;
    uint32_t token;
    friend bool operator<(const Child& a, const Child& b) {
      return a.projection != b.projection ? a.projection < b.projection : a.token < b.token;
    }
  };
  // Children of one parent by projection. `lift` is the unit their projections were computed with;
  // a cell is brought up to date when it is next inserted into.
  struct Cell {
    float lift = 0;
    std::vector<Child> children;
  };
  // A level above 0: its pivots in order of arrival with their cells.
  struct Level {
    std::vector<uint32_t> tokens;
    std::vector<float> keys;  // [pivots, head_dim], f32: parents are looked for in one matrix
    std::vector<Cell> cells;
  };
  struct TokenInfo {
    float norm = 0;           // |k|
    float head = 0;           // direction[0:dim] . k
    float parent_dot = 0;     // k . parent's key
    uint32_t parent = kRoot;  // index in the level above
    uint32_t node = 0;        // index in its own level, for level >= 1
    uint32_t page = 0;
    uint8_t row = 0;
    uint8_t level = 0;
  };
  struct SearchScratch;

  uint32_t token_count() const { return static_cast<uint32_t>(tokens_.size()); }
  uint32_t page_count() const { return static_cast<uint32_t>(page_fills_.size()); }
  uint32_t level_size(uint32_t level) const;
  uint32_t top_level() const { return static_cast<uint32_t>(levels_.size()); }
  Level& level(uint32_t l) { return levels_[l - 1]; }
  const Level& level(uint32_t l) const { return levels_[l - 1]; }
  Cell& CellOf(const TokenInfo& child);
  float LiftOf(float norm) const;  // sqrt(1 - (norm / lift_)^2)
  float ProjectionOf(const TokenInfo& token) const;
  // Half the squared distance between lifted keys, up to a constant: smaller is nearer.
  float Distance(float dot, const TokenInfo& a, const TokenInfo& b) const {
    return -(dot / lift_) / lift_ - LiftOf(a.norm) * LiftOf(b.norm);
  }

  // Build (dci_tree_build.cc). BuildTree makes levels, parents and cells of `rows`, not pages.
  void DrawDirection();
  uint32_t NextLevel();  // by the counter rule; counts the token
  void BuildTree(const TokenRows& rows);
  void MeasureTokens(const TokenRows& rows);
  void AssignLevels(const TokenRows& rows);
  void FindParents(const TokenRows& rows, uint32_t level);
  void FindParentsExhaustively(const TokenRows& rows, uint32_t level,
                               std::span<const uint32_t> tokens);
  void FindParentsByAnchors(const TokenRows& rows, std::span<const uint32_t> tokens);
  void FillCells(uint32_t level);  // cells of level + 1 from the parents of `level`
  void CutPages(PageLayout* layout);

  // The nearest pivot on level `to`, by a beam over the pivots' keys (dci_tree_search.cc).
  uint32_t BeamParent(const float* key, const TokenInfo& info, uint32_t to, uint32_t field_of_view,
                      double share) const;

  // Insert (dci_tree_insert.cc).
  uint32_t ParentFor(const TokenInfo& info, const float* key, float* dot) const;
  void AddPivot(uint32_t token, const float* key, const PagedKv& pages);
  void Refresh(Cell* cell) const;
  InsertPlan PlaceInPage(const Cell& cell, const Child& child);
  InsertPlan SplitPage(uint32_t page, const Child& child);
  // (token, k . key) of the tokens one level below, as far as they are in memory.
  std::vector<std::pair<uint32_t, float>> DotsBelow(uint32_t below, const float* key,
                                                    const PagedKv& pages) const;
  void StealOne(uint32_t token, float dot, uint32_t pivot);
  void AppendToPage(uint32_t token, uint32_t page);

  // Search (dci_tree_search.cc).
  void SearchHead(const float* query, const PagedKv& pages, uint32_t wanted,
                  SearchScratch* s) const;
  void SearchHeadAt(const float* query, float projection, const PagedKv& pages, uint32_t view,
                    SearchScratch* s) const;
  void Visit(const Child& child, const float* query, const PagedKv& pages, SearchScratch* s) const;
  static std::pair<uint32_t, uint32_t> ScanRange(const Cell& cell, float projection,
                                                 uint32_t at_least, double share);
  void Report(const SelectRequest& request, const PagedKv& pages, SearchScratch* s,
              Selection* out) const;

  // Image and invariants (dci_tree_image.cc).
  Status CheckShape() const;
  Status CheckCells() const;
  static void PutCell(const Cell& cell, class ImageWriter* writer);
  static Cell GetCell(class ImageReader* reader);

  const PolicyOptions options_;
  const DciTreeOptions tree_options_;

  std::vector<float> direction_;  // unit vector of R^(head_dim + 1), drawn from the seed
  float lift_ = 0;                // largest |k| so far
  std::vector<TokenInfo> tokens_;
  std::vector<Level> levels_;  // levels 1.. top
  Cell root_;                  // tokens of the top level
  uint32_t level0_count_ = 0;
  std::vector<uint32_t> page_tokens_;  // [pages, kPageTokens]
  std::vector<uint8_t> page_fills_;
};

}  // namespace icecache
