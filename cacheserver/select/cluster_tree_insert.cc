// Growing and cutting back: Insert, splits of pages and supers, Retain.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {

constexpr uint32_t kProbedSupers = 4;
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
  return std::accumulate(lanes, lanes + 16, 0.0f);
}

// Nearest pages of the nearest supers.
class Descender {
 public:
  Descent Run(const Tree& tree, const float* z, const PagedKv& pages) {
    const uint32_t dim = tree.head_dim;
    pull_.resize(dim);
    for (uint32_t j = 0; j < dim; ++j) pull_[j] = tree.basis.weight[j] * z[j];
    query_.Assign(pull_.data(), 1, dim, 2);
    norm_ = Norm(tree.basis, z);
    Descent descent;
    for (const auto& [distance, super] : NearestSupers(tree)) {
      if (descent.super == kNone) descent.super = super;
      for (uint32_t b = 0; b < tree.supers[super].block_count; ++b) {
        Visit(tree, tree.supers[super].blocks[b], pages, &descent);
      }
    }
    return descent;
  }

 private:
  // |z - mean|^2 of the 16 slots of a block.
  void Distances(const NodeTable& nodes, uint32_t block, float* out) {
    const uint8_t* keys = nodes.keys.row(block);
    const float* scales = nodes.scale.data() + size_t{block} * kBlockRows;
    const float zero = 0;
    ScoreBlocks(query_, &keys, &scales, 1, &zero, out, kBlockRows);
    for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
      out[lane] =
          std::max(0.0f, norm_ - 2 * out[lane] + nodes.square[size_t{block} * kBlockRows + lane]);
    }
  }

  std::span<const std::pair<float, uint32_t>> NearestSupers(const Tree& tree) {
    order_.clear();
    float distance[kBlockRows];
    for (uint32_t block = 0; block < tree.super_nodes.block_count(); ++block) {
      Distances(tree.super_nodes, block, distance);
      for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
        const uint32_t s = block * kBlockRows + lane;
        if (s < tree.super_count() && tree.supers[s].page_count > 0)
          order_.emplace_back(distance[lane], s);
      }
    }
    const size_t count = std::min<size_t>(kProbedSupers, order_.size());
    std::partial_sort(order_.begin(), order_.begin() + static_cast<ptrdiff_t>(count), order_.end());
    return {order_.data(), count};
  }

  void Visit(const Tree& tree, uint32_t block, const PagedKv& pages, Descent* descent) {
    float distance[kBlockRows];
    Distances(tree.leaves, block, distance);
    for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
      // Half the distance is the least that any page size can make of it; most lanes end here.
      if (0.5f * distance[lane] >= std::max(descent->near.cost, descent->room.cost)) continue;
      const uint32_t page = tree.page_of_slot[size_t{block} * kBlockRows + lane];
      if (page == kNone || pages.pages[page].k == nullptr) continue;
      const auto n = static_cast<float>(tree.pages[page].count);
      // Ward's criterion: a small page's mean lies further from its own kind than a full page's.
      const Place place{page, distance[lane] * n / (n + 1)};
      if (place.cost < descent->near.cost) descent->near = place;
      if (tree.pages[page].count < kPageRows && place.cost < descent->room.cost)
        descent->room = place;
    }
  }

  QuantizedQueries query_;
  std::vector<float> pull_;
  float norm_ = 0;
  std::vector<std::pair<float, uint32_t>> order_;
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

// Divides points[count, dim] in two by two-means in the metric; side[i] is 0 or 1, both occur.
void Divide(const Basis& basis, const float* points, uint32_t count, uint32_t dim, uint8_t* side) {
  std::vector<float> mean[2] = {std::vector<float>(dim), std::vector<float>(dim)};
  const auto distance = [&](const float* a, const float* b) {
    float lanes[16] = {};
    for (uint32_t j = 0; j < dim; j += 16) {
      for (uint32_t i = 0; i < 16; ++i) {
        const float x = a[j + i] - b[j + i];
        lanes[i] += basis.weight[j + i] * x * x;
      }
    }
    return std::accumulate(lanes, lanes + 16, 0.0f);
  };
  const auto farthest = [&](const float* from) {
    uint32_t best = 0;
    float most = -1;
    for (uint32_t i = 0; i < count; ++i) {
      const float d = distance(points + size_t{i} * dim, from);
      if (d > most) {
        most = d;
        best = i;
      }
    }
    return points + size_t{best} * dim;
  };
  const float* one = farthest(points);
  const float* two = farthest(one);
  mean[0].assign(one, one + dim);
  mean[1].assign(two, two + dim);
  for (int pass = 0; pass < 4; ++pass) {
    uint32_t sizes[2] = {0, 0};
    for (uint32_t i = 0; i < count; ++i) {
      const float* x = points + size_t{i} * dim;
      side[i] = distance(x, mean[1].data()) < distance(x, mean[0].data()) ? 1 : 0;
      ++sizes[side[i]];
    }
    if (sizes[0] == 0 || sizes[1] == 0) {  // all points equal
      for (uint32_t i = 0; i < count; ++i) side[i] = i < count / 2 ? 0 : 1;
      return;
    }
    for (auto& m : mean) std::fill(m.begin(), m.end(), 0.0f);
    for (uint32_t i = 0; i < count; ++i) {
      const float share = 1.0f / static_cast<float>(sizes[side[i]]);
      for (uint32_t j = 0; j < dim; ++j) mean[side[i]][j] += share * points[size_t{i} * dim + j];
    }
  }
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
  std::vector<uint8_t> side(count);
  Divide(tree.basis, means.data(), count, dim, side.data());
  uint32_t right = std::accumulate(side.begin(), side.end(), 0u);
  if (std::min(right, count - right) < kBlockRows / 2) {  // lopsided: would be full again at once
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

// Splits a full page and adds the new row to the nearer half.
InsertPlan SplitPage(Tree& tree, const TokenRows& row, const PagedKv& pages, uint32_t page) {
  const uint32_t dim = tree.head_dim;
  PageRows all(dim);
  all.AddPage(tree.basis, pages.dtype, pages.pages[page]);
  std::vector<float> points(all.z.begin(), all.z.begin() + size_t{all.count} * dim);
  PageRows added(dim);
  added.Add(tree.basis, row.dtype, row.k, row.v);
  points.insert(points.end(), added.z.begin(), added.z.begin() + dim);
  uint8_t side[kPageRows + 1];
  Divide(tree.basis, points.data(), all.count + 1, dim, side);
  uint32_t moved = 0;
  for (uint32_t i = 0; i < all.count; ++i) moved |= side[i] == 1 ? 1u << i : 0u;
  if (moved == 0 || moved == 0xffff) moved = 0xff00;  // the new row alone on its side
  InsertPlan plan;
  const uint32_t opened = OpenPage(tree, page, kNone);
  plan.split_page = PageId(page);
  plan.split_mask = static_cast<uint16_t>(moved);
  plan.page = PageId(side[all.count] == 1 ? opened : page);
  for (uint32_t half : {page, opened}) {
    PageRows rows(dim);
    rows.AddPage(tree.basis, pages.dtype, pages.pages[page], half == page ? ~moved : moved);
    if (half == plan.page.value) rows.Add(tree.basis, row.dtype, row.k, row.v);
    WritePage(tree, half, rows);
  }
  return plan;
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
  return {PageId(page), std::nullopt, 0};
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
  tree->sketches = ChunkedRows(SketchDims(tree->head_dim) * kBlockRows);  // an old image has fewer
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
  thread_local PageRows rows, page;  // 32 KiB that need not be zeroed for every token
  const uint32_t dim = tree->head_dim;
  rows.Reset(dim);
  rows.Add(tree->basis, row.dtype, row.k, row.v);
  const Descent descent = descender.Run(*tree, rows.z.data(), pages);
  const float unit = tree->basis.page_spread;
  const float slack = Slack(*tree, options.insert_slack * unit);
  const bool join = descent.room.page != kNone && descent.room.cost <= descent.near.cost + slack;
  InsertPlan plan;
  if (join) {
    plan.page = PageId(descent.room.page);
    page.Reset(dim);
    page.AddPage(tree->basis, pages.dtype, pages.pages[descent.room.page]);
    page.Add(tree->basis, row.dtype, row.k, row.v);
    WritePage(*tree, descent.room.page, page);
    WriteSuper(*tree, SuperOf(*tree, descent.room.page));
  } else {
    const uint32_t near = descent.near.page;
    const bool impure =
        near != kNone && tree->pages[near].count == kPageRows &&
        tree->leaves.spread[tree->pages[near].slot] * tree->leaves.spread[tree->pages[near].slot] >
            kImpure * unit;
    if (impure) {
      plan = SplitPage(*tree, row, pages, near);
    } else {
      plan.page = PageId(OpenPage(*tree, near, descent.super));
      WritePage(*tree, plan.page.value, rows);
    }
    WriteSuper(*tree, SuperOf(*tree, plan.page.value));
    if (impure) WriteSuper(*tree, SuperOf(*tree, near));
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
