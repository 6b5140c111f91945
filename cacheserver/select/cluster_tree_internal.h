// Inside of ClusterTree, shared by its source files and tests only.
//
// Coordinates: z_j = (k_j - mean_j) / scale_j, clamped. A logit is q . k = q . mean + sum_j (q_j
// scale_j) z_j. The metric weighs z_j^2 by weight_j = E[q_j^2] scale_j^2 (mean 1): the squared
// distance of two keys is then the variance of their logit difference, up to one factor for the
// whole slice.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/select/cluster_tree.h"
#include "kernels/packing.h"
#include "kernels/quantized.h"
#include "kernels/sketch.h"

namespace icecache::cluster_tree {

using packing::Basis;
using packing::BasisOf;
using packing::kCoordinateMax;
using packing::kPageRows;
using packing::kSketchDims;
using packing::kSketchDimsMax;
using packing::kValueShare;
using packing::LearnBasis;
using packing::LearnPages;
using packing::Moments;
using packing::PackContent;
using packing::PackSequential;
using packing::SketchDims;
using packing::ToCoordinates;
using packing::ValueSpread;

inline constexpr uint32_t kNone = ~0u;
inline constexpr uint32_t kSuperPages = 32;     // pages of a super after Build
inline constexpr uint32_t kSuperBlocksMax = 4;  // a super splits before it needs a fifth block
inline constexpr float kValueMax = 1e30f;       // mean values saturate
static_assert(kSuperBlocksMax * kBlockRows == kSuperPagesMax);

// Of 16 values, in eight lanes: sixteen additions one after the other take as long as what they
// sum.
inline float Sum16(const float* x) {
  float lane[8];
  for (int i = 0; i < 8; ++i) lane[i] = x[i] + x[i + 8];
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// Null is fine.
inline void Prefetch(const std::byte* from, size_t bytes) {
  if (from == nullptr) return;
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

// Growable array of rows of bytes that never moves them: growing costs one small allocation.
class ChunkedRows {
 public:
  explicit ChunkedRows(size_t row_bytes = 1);
  void Resize(size_t row_count);  // new rows are zero
  size_t row_count() const { return row_count_; }
  size_t row_bytes() const { return row_bytes_; }
  size_t allocated_bytes() const { return chunks_.size() * (row_bytes_ << shift_); }
  uint8_t* row(size_t i) { return chunks_[i >> shift_].get() + (i & mask_) * row_bytes_; }
  const uint8_t* row(size_t i) const {
    return chunks_[i >> shift_].get() + (i & mask_) * row_bytes_;
  }
  int8_t* signed_row(size_t i) { return reinterpret_cast<int8_t*>(row(i)); }
  const int8_t* signed_row(size_t i) const { return reinterpret_cast<const int8_t*>(row(i)); }

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  size_t row_bytes_, shift_ = 0, mask_ = 0, row_count_ = 0;
  std::vector<std::unique_ptr<uint8_t[], Free>> chunks_;
};

// Summaries of nodes in slots, 16 to a block. An empty slot has log_count -infinity.
struct NodeTable {
  explicit NodeTable(uint32_t head_dim = 0) : keys(size_t{head_dim} * kBlockRows) {}
  ChunkedRows keys;          // a row is a block
  std::vector<float> scale;  // of the slot's int8 mean
  std::vector<float> log_count;
  std::vector<float> spread;  // sqrt(sum_j weight_j var_j)
  std::vector<float> square;  // sum_j weight_j mean_j^2, of the mean as quantised

  uint32_t block_count() const { return static_cast<uint32_t>(keys.row_count()); }
  void Resize(uint32_t head_dim, uint32_t block_count);
  void Clear(uint32_t head_dim, uint32_t slot);
};

struct Page {
  uint32_t slot = kNone;
  uint32_t count = 0;
  float value_scale = 0;
  float sketch_scale = 0;
  float rest_spread = 0;  // spread outside the sketched dimensions
};

struct Super {
  std::array<uint32_t, kSuperBlocksMax> blocks{};
  uint32_t block_count = 0;
  uint32_t page_count = 0;
  uint32_t token_count = 0;
  float value_scale = 0;
};

// The whole structure; what Save writes.
struct Tree {
  explicit Tree(uint32_t dim = 0)
      : head_dim(dim),
        leaves(dim),
        values(dim ? dim : 1),
        sketches(dim ? SketchBytes(SketchDims(dim)) : 1),
        super_nodes(dim),
        super_values(dim ? dim : 1) {}
  uint32_t head_dim = 0;
  uint64_t tokens = 0;
  Basis basis;
  NodeTable leaves;                      // slots of pages; a block belongs to one super
  std::vector<uint32_t> page_of_slot;    // kNone: empty
  std::vector<uint32_t> super_of_block;  // kNone: free
  std::vector<uint32_t> free_blocks, free_supers;
  std::vector<Page> pages;  // by PageId
  ChunkedRows values;       // [page] int8 mean value less value_mean
  ChunkedRows sketches;     // [page] block of the sketched dimensions, empty without
  NodeTable super_nodes;    // slot = super
  ChunkedRows super_values;
  std::vector<Super> supers;

  uint32_t page_count() const { return static_cast<uint32_t>(pages.size()); }
  uint32_t super_count() const { return static_cast<uint32_t>(supers.size()); }
  size_t index_bytes() const;
};

// Rows of one page on their way into a summary: z[16, dim] and v[16, dim] in f32.
struct PageRows {
  PageRows() = default;
  explicit PageRows(uint32_t head_dim) { Reset(head_dim); }
  void Reset(uint32_t head_dim) {
    dim = head_dim;
    count = 0;
    z.resize(size_t{kPageRows} * head_dim);
    v.resize(size_t{kPageRows} * head_dim);
  }
  uint32_t dim = 0, count = 0;
  std::vector<float> z, v;

  // Appends a stored row, in the basis' coordinates.
  void Add(const Basis& basis, DType dtype, const std::byte* k, const std::byte* v_row);
  void AddPage(const Basis& basis, DType dtype, const PageView& page, uint32_t mask = 0xffff);
};

// nodes.cc: summaries.
void WritePage(Tree& tree, uint32_t page, const PageRows& rows);  // pages[page].slot must be set
void WriteSuper(Tree& tree, uint32_t super);
uint32_t TakeBlock(Tree& tree, uint32_t super);                // adds an empty block to a super
uint32_t TakeSlot(Tree& tree, uint32_t super, uint32_t page);  // REQUIRES: room in the super
uint32_t AddSuper(Tree& tree);                                 // an emptied super, or a new one
void FreeSuper(Tree& tree, uint32_t super);                    // REQUIRES: no page left in it
void AddPages(Tree& tree, uint32_t page_count);                // appends pages without slots
void DecodeMean(const NodeTable& nodes, uint32_t dim, uint32_t slot, float* z);

// build.cc
Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints,
                         const ClusterTreeOptions& options, uint64_t seed, Tree* tree);

// insert.cc
Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages,
                          const ClusterTreeOptions& options, Tree* tree);
Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages, Tree* tree);

// search.cc
void Select(const Tree& tree, const ClusterTreeOptions& options, const SelectRequest& request,
            const PagedKv& pages, Selection* out);

// image.cc
void Save(const Tree& tree, const PolicyOptions& options, std::string* image);
Status Restore(std::string_view image, const PolicyOptions& options, Tree* tree);
Status Validate(const Tree& tree, const PolicyOptions& options, const PagedKv& pages);

}  // namespace icecache::cluster_tree
