// One Select call of ClusterTree, step by step. Scratch lives in the object, one object per thread.
//
//   Prepare      queries in the basis' coordinates, as digits
//   ScanSupers   above scan_pages, or with SelectRequest::near: which supers are looked into
//   ScanPages    estimated mass of every scanned page from its summary
//   Sketch       better estimates from token sketches, of pages that may hold a token of weight
//   Candidates   the best pages by estimate; ReadCandidates replaces estimates by exact logits
//   Choose       the pages to return
//   FixTokens    single heavy tokens elsewhere, read exactly
//   Residual     everything not returned, as an AttentionState
//
// Masses are linear, relative to exp(ref_[g]); scanned slot i is lane i % 16 of blocks_[i / 16].
#pragma once

#include <vector>

#include "cacheserver/select/cluster_tree_internal.h"

namespace icecache::cluster_tree {

class Search {
 public:
  void Run(const Tree& tree, const ClusterTreeOptions& options, const SelectRequest& request,
           const PagedKv& pages, Selection* out);

 private:
  struct Token {
    uint32_t page;  // position in heavy_slot_
    uint32_t lane;
  };

  // cluster_tree_search.cc
  void Prepare();
  void MarkNear();
  void ScanSupers();
  void RankSupers(uint32_t scan_pages);
  void ChooseSupers(uint32_t scan_pages);
  void ScanPages();
  void Sketch();
  void RankByPromise();
  void ChooseSketched();
  void ScoreSketched();
  void SumSketched();
  void ReadCandidates();
  void Rescale(uint32_t g, float ref, float shrink);
  void Choose();
  uint32_t PageOf(uint32_t i) const {
    return tree_->page_of_slot[size_t{blocks_[i / kBlockRows]} * kBlockRows + i % kBlockRows];
  }
  uint32_t SketchSlot(uint32_t m) const { return sketch_all_ ? m : sketch_slot_[m]; }
  bool InMemory(uint32_t page) const { return kv_->pages[page].k != nullptr; }

  // cluster_tree_rank.cc
  void SetTotals(uint32_t g, float indexed);
  void Totals();
  void Shares();
  void Rank();
  void RankByToken();
  void Candidates();
  uint32_t PagesWorthReading() const;
  uint32_t PagesByEstimate() const;
  uint32_t PagesAboveFloor() const;
  float BoundOfTop(const float* rank, size_t blocks, uint32_t count);
  void TopSlots(const std::vector<float>& rank, uint32_t count);

  // cluster_tree_residual.cc
  void FixTokens();
  void FindHeavyPages();
  void FindTokens(uint32_t cap);
  void ReadTokens();
  size_t GatherRows(size_t first, bool value);
  const std::byte* RowOf(const Token& token, bool value) const;
  void Residual();
  void AddReadPages(const AttentionStateRef& states);
  void AddFixedTokens(const AttentionStateRef& states);
  size_t AddRestOfPage(size_t first, const AttentionStateRef& states);
  void AddEstimates(const AttentionStateRef& states);
  void AddItem(const int8_t* row, float scale);
  void AddHeavyPages(const AttentionStateRef& states);

  const Tree* tree_ = nullptr;
  const ClusterTreeOptions* options_ = nullptr;
  const SelectRequest* request_ = nullptr;
  const PagedKv* kv_ = nullptr;
  Selection* out_ = nullptr;
  uint32_t group_ = 0, dim_ = 0;
  uint32_t slots_ = 0;          // scanned
  uint32_t scanned_pages_ = 0;  // of those slots, not empty
  uint32_t max_pages_ = 0;
  uint32_t unreturned_ = 0;  // rows read exactly in pages that are not returned
  bool read_all_ = false;
  bool narrow_ = false;  // SelectRequest::near says where to look

  QuantizedQueries coarse_, fine_;
  std::vector<float> scaled_, picked_;        // queries in coordinates; of the sketched dimensions
  std::vector<float> base_, rho_, rest_rho_;  // [group]
  std::vector<float> ref_, local_;            // [group]
  std::vector<float> indexed_, total_;        // [group]: mass; total_ = indexed_ + local_
  std::vector<uint32_t> blocks_;
  std::vector<const uint8_t*> block_keys_;
  std::vector<const float*> block_scales_;
  std::vector<float> centre_, mass_;  // [group][slots_]
  // [slots_] share of a head's indexed mass, largest over the group; that of pages which nobody has
  // read is by the totals as they were estimated.
  std::vector<float> share_;
  std::vector<float> rank_;        // [slots_] by the request's rule, of total_
  std::vector<float> super_mass_;  // [group][supers]: mass to be valued at the super's mean
  std::vector<uint8_t> super_scanned_;
  std::vector<std::pair<float, uint32_t>> order_;
  std::vector<float> spare_, maxima_;
  std::vector<uint32_t> found_;
  std::vector<float> found_scale_, block_sums_;

  bool sketch_all_ = false;            // sketched page m is scanned slot m, which may be empty
  std::vector<uint32_t> sketch_slot_;  // otherwise, its scanned slot, ascending
  uint32_t sketch_count_ = 0;
  size_t sketch_stride_ = 0;  // that in whole blocks
  std::vector<SketchPage> sketch_pages_;
  std::vector<float> sketch_spread_;  // outside the sketched dimensions
  // [group][sketch_stride_], relative to exp(sketch_ref_[g]); top only when ranking by token.
  std::vector<float> sketch_centre_, sketch_sum_, sketch_top_;
  std::vector<float> sketch_ref_;  // [group]

  std::vector<uint32_t> candidates_;  // scanned slots
  std::vector<uint8_t> candidate_read_, candidate_chosen_, candidate_valued_;
  std::vector<float> logits_;                          // [group][candidates * 16], then weights
  std::vector<float> candidate_mass_, candidate_top_;  // [group][candidates]

  std::vector<uint32_t> heavy_slot_;  // scanned slots of pages that may hold heavy tokens
  std::vector<SketchPage> heavy_pages_;
  std::vector<float> heavy_centre_;  // [group][heavy]
  std::vector<float> heavy_weight_;  // [group][heavy * 16]
  std::vector<Token> tokens_;        // by (page, lane)
  std::vector<std::byte> rows_;
  std::vector<float> token_logits_;  // [group][tokens], then weights
  std::vector<const int8_t*> item_rows_;
  size_t items_max_ = 0;
  std::vector<float> item_weights_;          // [group][items_max_]
  std::vector<float> item_sum_, weight_;     // [group]
  float weight_scratch_[limits::kGroupMax];  // of the next item
};

// Rows lie anywhere in memory, where the hardware does not foresee them: fetch some pages before
// they are used. Of a partly filled page the frame is fetched.
inline constexpr uint32_t kPagesAhead = 2;

// Of 16 values, in eight lanes, as Sum16.
inline float Max16(const float* x) {
  float lane[8];
  for (int i = 0; i < 8; ++i) lane[i] = x[i] > x[i + 8] ? x[i] : x[i + 8];
  for (int i = 0; i < 4; ++i) lane[i] = lane[i] > lane[i + 4] ? lane[i] : lane[i + 4];
  const float a = lane[0] > lane[1] ? lane[0] : lane[1], b = lane[2] > lane[3] ? lane[2] : lane[3];
  return a > b ? a : b;
}

// Keeps logits finite and ordered whatever the rows hold.
inline float Sane(float x) {
  x = x > -1e30f ? x : -1e30f;  // one after the other: nested, they would not vectorise
  return x < 1e30f ? x : 1e30f;
}

}  // namespace icecache::cluster_tree
