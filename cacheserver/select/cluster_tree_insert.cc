// Growing and cutting back: Insert, splits of pages and supers, Retain.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "cacheserver/select/cluster_tree_division.h"
#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {

constexpr uint32_t kProbedSupers = 8;
constexpr uint32_t kRebaseTokensMax = 512;  // beyond, the next build learns the basis anew
constexpr float kImpure = 1.5f;             // mean page variances above which a full page is split
// Pages are kept this full by accepting more distant ones; see Slack.
constexpr float kFillWanted = 0.88f;
constexpr float kFillFloor = 0.855f;

struct Place {
  uint32_t page = kNone;
  float cost =
      std::numeric_limits<float>::infinity();  // growth of the sum of squares if the token joins
};

struct Descent {
  uint32_t super = kNone;  // nearest
  Place near, room;        // best page in memory; the best of those with room
};

// Squares in the metric.
float Norm(const Basis& basis, const float* z) {
  float lanes[16] = {};
  for (size_t j = 0; j < basis.weight.size(); j += 16) {
    for (size_t i = 0; i < 16; ++i) lanes[i] += basis.weight[j + i] * z[j + i] * z[j + i];
  }
  return Sum16(lanes);
}

// Nearest pages of the nearest supers.
class Descender {
 public:
  // For a row z.
  Descent Run(const Tree& tree, const float* z, const PagedKv& pages) {
    Aim(tree, z, 1);
    FindSupers(tree);
    Descent descent;
    VisitAll(tree, pages, &descent);
    if (!nearest_.empty()) descent.super = nearest_.front().second;
    return descent;
  }

  // The page with room for `rows` rows whose mean is z, in the supers of the last Run: rows of a
  // page that is near to a row are in its neighbourhood, too.
  Place Again(const Tree& tree, const float* z, uint32_t rows, const PagedKv& pages) {
    Aim(tree, z, rows);
    Descent descent;
    descent.near.cost = 0;  // of no interest: only pages with room are nearer than anything
    VisitAll(tree, pages, &descent);
    return descent.room;
  }

 private:
  // |z - mean|^2 of the slots of up to kSuperBlocksMax blocks.
  void Distances(const NodeTable& nodes, std::span<const uint32_t> blocks, float* out) {
    const uint8_t* keys[kSuperBlocksMax];
    const float* scales[kSuperBlocksMax];
    for (size_t b = 0; b < blocks.size(); ++b) {
      keys[b] = nodes.keys.row(blocks[b]);
      scales[b] = nodes.scale.data() + size_t{blocks[b]} * kBlockRows;
    }
    const float zero = 0;
    ScoreBlocks(query_, keys, scales, blocks.size(), &zero, out, blocks.size() * kBlockRows);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const float* square = nodes.square.data() + size_t{blocks[b]} * kBlockRows;
      float* to = out + b * kBlockRows;
      for (uint32_t lane = 0; lane < kBlockRows; ++lane)
        to[lane] = std::max(0.0f, norm_ - 2 * to[lane] + square[lane]);
    }
  }

  void Aim(const Tree& tree, const float* z, uint32_t rows) {
    const uint32_t dim = tree.head_dim;
    rows_ = rows;
    // Half a row more: logarithms of counts are rounded.
    log_room_ = std::log(static_cast<float>(kPageRows - rows) + 0.5f);
    pull_.resize(dim);
    for (uint32_t j = 0; j < dim; ++j) pull_[j] = tree.basis.weight[j] * z[j];
    query_.Assign(pull_.data(), 1, dim, 2);
    norm_ = Norm(tree.basis, z);
  }

  // Fills nearest_, sorted; ties fall to the lower super.
  void FindSupers(const Tree& tree) {
    using Near = std::pair<float, uint32_t>;
    nearest_.clear();
    float distance[kSuperBlocksMax * kBlockRows];
    uint32_t blocks[kSuperBlocksMax];
    const uint32_t all = tree.super_nodes.block_count();
    for (uint32_t first = 0; first < all; first += kSuperBlocksMax) {
      const uint32_t count = std::min(kSuperBlocksMax, all - first);
      std::iota(blocks, blocks + count, first);
      Distances(tree.super_nodes, {blocks, count}, distance);
      const uint32_t supers = std::min(count * kBlockRows, tree.super_count() - first * kBlockRows);
      for (uint32_t i = 0; i < supers; ++i) {
        const bool full = nearest_.size() == kProbedSupers;
        if (full && distance[i] >= nearest_.back().first) continue;
        const Near near{distance[i], first * kBlockRows + i};
        if (Rows(tree.super_nodes, near.second) == 0) continue;
        if (full) nearest_.pop_back();
        auto at = nearest_.end();
        while (at != nearest_.begin() && near < *(at - 1)) --at;
        nearest_.insert(at, near);
      }
    }
  }

  void VisitAll(const Tree& tree, const PagedKv& pages, Descent* descent) {
    for (const auto& [distance, super] : nearest_) Visit(tree, tree.supers[super], pages, descent);
  }

  // Tokens of a slot, 0 of an empty one.
  static float Rows(const NodeTable& nodes, uint32_t slot) {
    return std::round(std::exp(nodes.log_count[slot]));
  }

  void Visit(const Tree& tree, const Super& super, const PagedKv& pages, Descent* descent) {
    float distance[kSuperBlocksMax * kBlockRows];
    Distances(tree.leaves, {super.blocks.data(), super.block_count}, distance);
    for (uint32_t i = 0; i < super.block_count * kBlockRows; ++i) {
      // Half the distance is the least that any page size can make of it. Most lanes end here, told
      // by what lies next to each other: pages themselves are far apart in memory.
      const uint32_t slot = super.blocks[i / kBlockRows] * kBlockRows + i % kBlockRows;
      const bool has_room = tree.leaves.log_count[slot] <= log_room_;
      Place &near = descent->near, &room = descent->room;
      const float bound = has_room ? std::max(near.cost, room.cost) : near.cost;
      if (0.5f * distance[i] >= bound) continue;
      const float n = Rows(tree.leaves, slot), m = static_cast<float>(rows_);
      if (n == 0) continue;
      // Ward's criterion: a small page's mean lies further from its own kind than a full page's.
      const Place place{tree.page_of_slot[slot], distance[i] * n * m / (n + m)};
      if (place.cost >= bound || pages.pages[place.page].k == nullptr) continue;
      if (place.cost < near.cost) near = place;
      if (has_room && place.cost < room.cost) room = place;
    }
  }

  QuantizedQueries query_;
  std::vector<float> pull_;
  float norm_ = 0;
  uint32_t rows_ = 1;
  float log_room_ = 0;  // of the most rows a page may have to take them
  std::vector<std::pair<float, uint32_t>> nearest_;  // supers, by distance
};

// How much further than the nearest page a token may go. More distant pages are accepted as pages
// empty out, so that fill holds at the price of purity.
float Slack(const Tree& tree, float slack) {
  const float fill =
      static_cast<float>(tree.tokens) / static_cast<float>(tree.pages.size() * kPageRows);
  if (fill >= kFillWanted) return slack;
  if (fill <= kFillFloor) return std::numeric_limits<float>::infinity();
  return slack * (kFillWanted - kFillFloor) / (fill - kFillFloor);
}

struct SavedNode {
  uint32_t page;
  int8_t row[limits::kHeadDimMax];
  float scale, log_count, spread, square;
};

void PutBack(Tree& tree, uint32_t super, const SavedNode& node) {
  const uint32_t slot = TakeSlot(tree, super, node.page);
  PackBlockRow(node.row, tree.head_dim, slot % kBlockRows, tree.leaves.keys.row(slot / kBlockRows));
  tree.leaves.scale[slot] = node.scale;
  tree.leaves.log_count[slot] = node.log_count;
  tree.leaves.spread[slot] = node.spread;
  tree.leaves.square[slot] = node.square;
}

// A full super becomes two.
void SplitSuper(Tree& tree, uint32_t super_index) {
  const uint32_t dim = tree.head_dim;
  std::vector<SavedNode> nodes;
  std::vector<float> means;
  const Super before = tree.supers[super_index];
  for (uint32_t b = 0; b < before.block_count; ++b) {
    for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
      const uint32_t slot = before.blocks[b] * kBlockRows + lane;
      if (tree.page_of_slot[slot] == kNone) continue;
      SavedNode node{tree.page_of_slot[slot],  {},
                     tree.leaves.scale[slot],  tree.leaves.log_count[slot],
                     tree.leaves.spread[slot], tree.leaves.square[slot]};
      UnpackBlockRow(tree.leaves.keys.row(before.blocks[b]), dim, lane, node.row);
      nodes.push_back(node);
      means.resize(nodes.size() * dim);
      DecodeMean(tree.leaves, dim, slot, means.data() + (nodes.size() - 1) * dim);
      tree.page_of_slot[slot] = kNone;
      tree.leaves.Clear(dim, slot);
    }
  }
  const auto count = static_cast<uint32_t>(nodes.size());
  Division division;
  division.Run(tree.basis, means.data(), count);
  std::vector<uint8_t>& side = division.side;
  if (std::min(division.sizes[0], division.sizes[1]) <
      kBlockRows / 2) {  // would be full again at once
    for (uint32_t i = 0; i < count; ++i) side[i] = i < count / 2 ? 0 : 1;
  }
  FreeSuper(tree, super_index);
  const uint32_t halves[2] = {AddSuper(tree), AddSuper(tree)};
  for (uint32_t i = 0; i < count; ++i) PutBack(tree, halves[side[i]], nodes[i]);
  for (uint32_t half : halves) WriteSuper(tree, half);
}

uint32_t SuperOf(const Tree& tree, uint32_t page) {
  return tree.super_of_block[tree.pages[page].slot / kBlockRows];
}

// A new page beside `page` (or in `super` when there is none), without content.
uint32_t OpenPage(Tree& tree, uint32_t page, uint32_t super) {
  if (page != kNone) super = SuperOf(tree, page);
  if (tree.supers[super].page_count == kSuperBlocksMax * kBlockRows) {
    SplitSuper(tree, super);
    super = page != kNone ? SuperOf(tree, page) : super;
    if (page == kNone && tree.supers[super].page_count == kSuperBlocksMax * kBlockRows)
      super = AddSuper(tree);
  }
  const uint32_t opened = tree.page_count();
  AddPages(tree, 1);
  TakeSlot(tree, super, opened);
  return opened;
}

// A full page and a new row near it: the smaller side of their division is to leave.
class Crowd {
 public:
  // row: in the basis' coordinates.
  void Assign(const Basis& basis, DType dtype, const PageView& page, const float* row) {
    const size_t dim = basis.weight.size();
    const uint32_t rows = page.fill;
    points_.resize((rows + 1) * dim);
    ToF32(page.k, dtype, rows * dim, points_.data());
    for (uint32_t r = 0; r < rows; ++r)
      ToCoordinates(basis, points_.data() + r * dim, points_.data() + r * dim);
    std::copy_n(row, dim, points_.data() + rows * dim);
    division_.Run(basis, points_.data(), rows + 1);
    leaving_ = division_.sizes[0] < division_.sizes[1] ? 0 : 1;
    mask_ = 0;
    for (uint32_t r = 0; r < rows; ++r)
      mask_ = static_cast<uint16_t>(mask_ | (division_.side[r] == leaving_ ? 1u << r : 0u));
    row_leaves_ = division_.side[rows] == leaving_;
  }
  const float* mean() const { return division_.mean[leaving_].data(); }  // of those that leave
  uint32_t count() const { return division_.sizes[leaving_]; }
  uint16_t mask() const { return mask_; }  // the page's rows that leave
  bool row_leaves() const { return row_leaves_; }
  float gain() const { return division_.gain; }

 private:
  Division division_;
  std::vector<float> points_;
  uint32_t leaving_ = 0;
  uint16_t mask_ = 0;
  bool row_leaves_ = false;
};

// Those of the crowd that leave go from page `from` to page `to`, which has room for them; the new
// row goes with its side.
InsertPlan Disperse(Tree& tree, const TokenRows& row, const PagedKv& pages, const Crowd& crowd,
                    uint32_t from, uint32_t to) {
  InsertPlan plan{PageId(crowd.row_leaves() ? to : from)};
  if (crowd.mask() != 0) plan.move = RowMove{PageId(from), crowd.mask(), PageId(to)};
  thread_local PageRows rows;
  for (uint32_t page : {from, to}) {
    rows.Reset(tree.head_dim);
    const uint32_t leave = crowd.mask(), stay = ~leave;
    if (page < pages.page_count) {
      rows.AddPage(tree.basis, pages.dtype, pages.pages[page], page == from ? stay : 0xffff);
    }
    if (page == to) rows.AddPage(tree.basis, pages.dtype, pages.pages[from], leave);
    if (page == plan.page.value) rows.Add(tree.basis, row.dtype, row.k, row.v);
    WritePage(tree, page, rows);
  }
  WriteSuper(tree, SuperOf(tree, from));
  if (SuperOf(tree, to) != SuperOf(tree, from)) WriteSuper(tree, SuperOf(tree, to));
  return plan;
}

// The row joins a page with room, or one without rows.
InsertPlan Join(Tree& tree, const TokenRows& row, const PagedKv& pages, uint32_t page) {
  thread_local PageRows rows;  // 32 KiB that need not be zeroed for every token
  rows.Reset(tree.head_dim);
  if (page < pages.page_count) rows.AddPage(tree.basis, pages.dtype, pages.pages[page]);
  rows.Add(tree.basis, row.dtype, row.k, row.v);
  WritePage(tree, page, rows);
  WriteSuper(tree, SuperOf(tree, page));
  return {PageId(page)};
}

Status CheckRow(const Tree& tree, const TokenRows& row, const PagedKv& pages) {
  if (row.count != 1 || row.head_dim != tree.head_dim) {
    return InvalidArgument("cluster_tree: insert of " + std::to_string(row.count) +
                           " rows of head_dim " + std::to_string(row.head_dim) +
                           ", expected 1 of " + std::to_string(tree.head_dim));
  }
  if (!AllFinite(row.k, row.dtype, row.head_dim))
    return InvalidArgument("cluster_tree: the key is NaN or infinite");
  if (!AllFinite(row.v, row.dtype, row.head_dim))
    return InvalidArgument("cluster_tree: the value is NaN or infinite");
  KV_CHECK(pages.page_count == tree.page_count());
  return OkStatus();
}

// The first token of an empty slice is its own basis until there are more.
InsertPlan InsertFirst(const TokenRows& row, Tree* tree) {
  const uint32_t dim = tree->head_dim;
  std::vector<float> k(dim), v(dim);
  ToF32(row.k, row.dtype, dim, k.data());
  ToF32(row.v, row.dtype, dim, v.data());
  LearnBasis(k.data(), v.data(), 1, dim, &tree->basis);
  const uint32_t super = AddSuper(*tree);
  const uint32_t page = OpenPage(*tree, kNone, super);
  PageRows rows(dim);
  rows.Add(tree->basis, row.dtype, row.k, row.v);
  WritePage(*tree, page, rows);
  WriteSuper(*tree, super);
  tree->tokens = 1;
  return {PageId(page)};
}

// A slice that began with few rows learns its basis anew when it has four times as many.
void Rebase(const PagedKv& pages, Tree* tree) {
  const uint32_t dim = tree->head_dim;
  if (tree->tokens < 4 * tree->basis.tokens || tree->tokens > kRebaseTokensMax) return;
  std::vector<float> k(tree->tokens * dim), v(tree->tokens * dim);
  Packing packing;
  uint32_t rows = 0;
  for (uint32_t p = 0; p < tree->page_count(); ++p) {
    const PageView& page = pages.pages[p];
    if (page.k == nullptr) return;
    packing.layout.page_begin.push_back(rows);
    ToF32(page.k, pages.dtype, size_t{page.fill} * dim, k.data() + size_t{rows} * dim);
    ToF32(page.v, pages.dtype, size_t{page.fill} * dim, v.data() + size_t{rows} * dim);
    rows += page.fill;
  }
  packing.layout.page_begin.push_back(rows);
  packing.layout.tokens.resize(rows);
  std::iota(packing.layout.tokens.begin(), packing.layout.tokens.end(), 0u);
  LearnBasis(k.data(), v.data(), rows, dim, &tree->basis);
  const TokenRows all{DType::kF32, dim, rows, reinterpret_cast<const std::byte*>(k.data()),
                      reinterpret_cast<const std::byte*>(v.data())};
  LearnPages(all, packing, ClusterTreeOptions::Sketch::kAuto, &tree->basis);
  tree->sketches = ChunkedRows(SketchBytes(SketchDims(tree->head_dim)));  // an old image has fewer
  tree->sketches.Resize(tree->basis.sketched() ? tree->page_count() : 0);
  for (uint32_t p = 0; p < tree->page_count(); ++p) {
    PageRows page(dim);
    page.AddPage(tree->basis, pages.dtype, pages.pages[p]);
    WritePage(*tree, p, page);
  }
  for (uint32_t s = 0; s < tree->super_count(); ++s) WriteSuper(*tree, s);
}

}  // namespace

Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages,
                          const ClusterTreeOptions& options, Tree* tree) {
  KV_RETURN_IF_ERROR(CheckRow(*tree, row, pages));
  if (tree->page_count() == 0) return InsertFirst(row, tree);
  Rebase(pages, tree);
  thread_local Descender descender;
  thread_local Crowd crowd;
  thread_local std::vector<float> z;
  z.resize(tree->head_dim);
  ToF32(row.k, row.dtype, tree->head_dim, z.data());
  ToCoordinates(tree->basis, z.data(), z.data());
  const Descent descent = descender.Run(*tree, z.data(), pages);
  const uint32_t near = descent.near.page;
  const float unit = tree->basis.page_spread, slack = options.insert_slack * unit;
  const float limit = descent.near.cost + Slack(*tree, slack);
  // A full page may rather part with others than refuse the row.
  const bool full = near != kNone && tree->pages[near].count == kPageRows;
  Place away;
  if (full) {
    crowd.Assign(tree->basis, pages.dtype, pages.pages[near], z.data());
    away = descender.Again(*tree, crowd.mean(), crowd.count(), pages);
    away.cost += descent.near.cost - crowd.gain();
  }
  InsertPlan plan;
  if (away.page != kNone && away.cost <= std::min(limit, descent.room.cost - slack)) {
    plan = Disperse(*tree, row, pages, crowd, near, away.page);
  } else if (descent.room.page != kNone && descent.room.cost <= limit) {
    plan = Join(*tree, row, pages, descent.room.page);
  } else {
    const float spread = full ? tree->leaves.spread[tree->pages[near].slot] : 0.0f;
    const uint32_t opened = OpenPage(*tree, near, descent.super);
    plan = spread * spread > kImpure * unit ? Disperse(*tree, row, pages, crowd, near, opened)
                                            : Join(*tree, row, pages, opened);
  }
  ++tree->tokens;
  return plan;
}

Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages, Tree* tree) {
  if (keep_masks.size() != tree->page_count()) {
    return InvalidArgument("cluster_tree: " + std::to_string(keep_masks.size()) + " masks for " +
                           std::to_string(tree->page_count()) + " pages");
  }
  const auto full = [&](uint32_t p) { return (1u << tree->pages[p].count) - 1u; };
  for (uint32_t p = 0; p < keep_masks.size(); ++p) {
    const uint32_t keep = keep_masks[p] & full(p);
    if (keep != 0 && keep != full(p) && pages.pages[p].k == nullptr) {
      return FailedPrecondition("cluster_tree: page " + std::to_string(p) +
                                " loses some of its rows but is not in memory; load it first");
    }
  }
  std::vector<uint8_t> touched(tree->super_count(), 0);
  uint32_t kept = 0;
  for (uint32_t p = 0; p < keep_masks.size(); ++p) {
    const uint32_t keep = keep_masks[p] & full(p);
    const uint32_t slot = tree->pages[p].slot;
    if (keep != full(p)) touched[SuperOf(*tree, p)] = 1;
    if (keep == 0) {
      tree->tokens -= tree->pages[p].count;
      tree->page_of_slot[slot] = kNone;
      tree->leaves.Clear(tree->head_dim, slot);
      continue;
    }
    if (keep != full(p)) {
      tree->tokens -= tree->pages[p].count;
      PageRows rows(tree->head_dim);
      rows.AddPage(tree->basis, pages.dtype, pages.pages[p], keep);
      WritePage(*tree, p, rows);
      tree->tokens += rows.count;
    }
    if (kept != p) {
      tree->pages[kept] = tree->pages[p];
      tree->page_of_slot[slot] = kept;
      std::copy_n(tree->values.row(p), tree->values.row_bytes(), tree->values.row(kept));
      if (tree->basis.sketched())
        std::copy_n(tree->sketches.row(p), tree->sketches.row_bytes(), tree->sketches.row(kept));
    }
    ++kept;
  }
  tree->pages.resize(kept);
  tree->values.Resize(kept);
  if (tree->basis.sketched()) tree->sketches.Resize(kept);
  for (uint32_t s = 0; s < tree->super_count(); ++s) {
    if (touched[s] == 0) continue;
    WriteSuper(*tree, s);
    if (tree->supers[s].page_count == 0) FreeSuper(*tree, s);
  }
  if (kept == 0) {
    std::vector<float> energy = std::move(tree->basis.energy);
    *tree = Tree(tree->head_dim);
    tree->basis.energy = std::move(energy);
  }
  return OkStatus();
}

}  // namespace icecache::cluster_tree
