#include "cacheserver/select/cluster_tree_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/distance.h"
#include "kernels/page_mass.h"

namespace icecache::cluster_tree {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kOptimism = 3.0f;  // standard deviations granted to an unseen page or super
// A token's share of the mass below which its page's summary will do; at 3e-5 errors were the same.
constexpr float kNegligibleToken = 1e-5f;
// A page is sketched when a token kOptimism deviations above its mean would have this share of a
// head's mass. Where all dimensions are sketched, all pages are: there a sketch finds a fact among
// strangers, of which the page's estimate says nothing (docs/results.md).
constexpr float kWorthSketching = 2e-4f;

// Sum over j of use[j] * x[j] * y[j]; dim is a multiple of 16.
float WeightedDot(const float* use, const float* x, const float* y, size_t dim) {
  float lanes[16] = {};
  for (size_t j = 0; j < dim; j += 16) {
    for (size_t i = 0; i < 16; ++i) lanes[i] += use[j + i] * x[j + i] * y[j + i];
  }
  return std::accumulate(lanes, lanes + 16, 0.0f);
}

// Variance of z inside pages as a query sees it, relative to the metric, as a factor on spreads.
// Counts the dimensions with use[j] = 1.
float SpreadFactor(const Basis& basis, const float* square, const float* use) {
  const size_t dim = basis.weight.size();
  const float* variance = basis.page_variance.data();
  const auto factor = [](float seen, float metric) {
    const float x = std::sqrt(seen / metric);
    return x < 1e15f ? x : 1e15f;  // also NaN: an infinite square in a dimension that never varies
  };
  const float metric = WeightedDot(use, basis.weight.data(), variance, dim);
  if (metric > 0) return factor(WeightedDot(use, square, variance, dim), metric);
  const float plain_metric = WeightedDot(use, basis.weight.data(), use, dim);
  return plain_metric > 0 ? factor(WeightedDot(use, square, use, dim), plain_metric) : 0.0f;
}

}  // namespace

void Search::Run(const Tree& tree, const ClusterTreeOptions& options, const SelectRequest& request,
                 const PagedKv& pages, Selection* out) {
  tree_ = &tree;
  options_ = &options;
  request_ = &request;
  kv_ = &pages;
  out_ = out;
  group_ = request.group;
  dim_ = tree.head_dim;
  out->pages.clear();
  out->read.clear();
  out->covered_mass = 0;
  out->tokens_read = 0;
  out->residual.Reset(group_, dim_);
  if (tree.page_count() == 0) return;
  KV_CHECK(group_ >= 1 && group_ <= limits::kGroupMax && pages.page_count >= tree.page_count());
  max_pages_ = std::min(request.max_pages, tree.page_count());
  read_all_ = request.read_cap >= tree.tokens;
  narrow_ = !request.near.empty() && !read_all_;
  Prepare();
  ScanSupers();
  ScanPages();
  sketch_count_ = 0;
  if (tree.basis.sketched() && !read_all_) {
    Sketch();
    Totals();
  }
  Shares();
  Candidates();
  ReadCandidates();
  Choose();
  if (request.residual) Residual();
}

void Search::Prepare() {
  const Basis& basis = tree_->basis;
  scaled_.resize(size_t{group_} * dim_);
  base_.resize(group_);
  rho_.resize(group_);
  rest_rho_.resize(group_);
  ref_.resize(group_);
  total_.resize(group_);
  indexed_.resize(group_);
  local_.resize(group_);
  float square[limits::kHeadDimMax], use[limits::kHeadDimMax];
  std::fill_n(use, dim_, 1.0f);
  const auto factor = [&](const float* z) {
    for (uint32_t j = 0; j < dim_; ++j) square[j] = z[j] * z[j];
    return SpreadFactor(basis, square, use);
  };
  for (uint32_t g = 0; g < group_; ++g) {
    const float* q = request_->queries + size_t{g} * dim_;
    float* to = scaled_.data() + size_t{g} * dim_;
    for (uint32_t j = 0; j < dim_; ++j) to[j] = q[j] * basis.scale[j];
    base_[g] = Sane(WeightedDot(use, q, basis.mean.data(), dim_));
    rho_[g] = factor(to);
  }
  // Next to what a sketch leaves out, five bits more of the query are nothing.
  coarse_.Assign(scaled_.data(), group_, dim_, basis.sketched() ? 1 : 2);
  if (!basis.sketched()) return;
  const auto dims = static_cast<uint32_t>(basis.sketch_dims.size());
  picked_.resize(size_t{group_} * dims);
  for (uint32_t j : basis.sketch_dims) use[j] = 0;
  for (uint32_t g = 0; g < group_; ++g) {
    const float* from = scaled_.data() + size_t{g} * dim_;
    for (uint32_t i = 0; i < dims; ++i) picked_[g * dims + i] = from[basis.sketch_dims[i]];
    rest_rho_[g] = factor(from);
  }
  fine_.Assign(picked_.data(), group_, dims, 1);
}

void Search::MarkNear() {
  for (const PageId page : request_->near) {
    if (page.value >= tree_->page_count()) continue;
    super_scanned_[tree_->super_of_block[tree_->pages[page.value].slot / kBlockRows]] = 1;
  }
}

// Fills blocks_ with what is to be scanned, and super_mass_ with the log mass of what is not.
void Search::ScanSupers() {
  const uint32_t supers = tree_->super_count();
  scanned_pages_ = 0;
  super_mass_.assign(size_t{group_} * supers, kMinusInfinity);
  super_scanned_.assign(supers, 1);
  // Sketches cost more than the scan, and heads that need them hide single tokens in dull supers.
  uint32_t scan_pages = options_->scan_pages * (tree_->basis.sketched() ? 4 : 1);
  if (narrow_) scan_pages = std::min(scan_pages, options_->near_scan_pages);
  if (tree_->page_count() > scan_pages && !read_all_) {
    RankSupers(scan_pages);
    ChooseSupers(scan_pages);
  }
  blocks_.clear();
  for (uint32_t s = 0; s < supers; ++s) {
    if (super_scanned_[s] == 0) continue;
    for (uint32_t g = 0; g < group_; ++g) super_mass_[size_t{g} * supers + s] = kMinusInfinity;
    const Super& super = tree_->supers[s];
    scanned_pages_ += super.page_count;
    blocks_.insert(blocks_.end(), super.blocks.begin(), super.blocks.begin() + super.block_count);
  }
}

// order_ = supers that may be among the best, with how far an optimistic bound on a token of theirs
// lies below the best one's; super_mass_ of all of them.
void Search::RankSupers(uint32_t scan_pages) {
  const NodeTable& nodes = tree_->super_nodes;
  const uint32_t supers = tree_->super_count(), blocks = nodes.block_count();
  const size_t slots = size_t{blocks} * kBlockRows;
  block_keys_.clear();
  block_scales_.clear();
  blocks_.clear();
  for (uint32_t b = 0; b < blocks; ++b) {
    blocks_.push_back(b);
    block_keys_.push_back(nodes.keys.row(b));
    block_scales_.push_back(nodes.scale.data() + size_t{b} * kBlockRows);
  }
  centre_.resize(group_ * slots);
  rank_.resize(slots);
  spare_.resize(slots);
  ScoreBlocks(coarse_, block_keys_.data(), block_scales_.data(), blocks, base_.data(),
              centre_.data(), slots);
  for (uint32_t g = 0; g < group_; ++g) {
    float* centre = centre_.data() + g * slots;
    EstimateLogMasses(blocks_.data(), blocks, nodes.spread.data(), nodes.log_count.data(), rho_[g],
                      centre, spare_.data());
    std::copy_n(spare_.data(), supers, super_mass_.data() + size_t{g} * supers);
    EstimateTops(blocks_.data(), blocks, nodes.spread.data(), nodes.log_count.data(),
                 kOptimism * rho_[g], 0.0f, centre, spare_.data());
    // Heads have logits of different sizes: each ranks supers relative to its own best.
    const float best = MaxOf(spare_.data(), slots);
    for (float& x : spare_) x -= best;
    MaxScaled(spare_.data(), slots, 1.0f, g == 0, rank_.data());
  }
  // Supers have half as many pages as wanted of them at least, but for a few.
  const float bound =
      BoundOfTop(rank_.data(), blocks, std::max(1u, scan_pages / (kSuperPages / 2)));
  found_.resize(slots + kBlockRows);
  found_.resize(IndicesAtLeast(rank_.data(), supers, bound, found_.data()));
  order_.clear();
  for (const uint32_t s : found_) order_.emplace_back(-rank_[s], s);
}

// Marks as scanned the supers that are near and, besides, the best of order_ with `scan_pages`
// pages together. Selection by halves: sorting thousands of supers would cost more than scanning.
void Search::ChooseSupers(uint32_t scan_pages) {
  super_scanned_.assign(tree_->super_count(), 0);
  if (narrow_) {
    MarkNear();
    std::erase_if(order_, [&](const auto& x) { return super_scanned_[x.second] != 0; });
  }
  size_t low = 0, high = order_.size();  // the border is in [low, high]
  uint32_t pages = 0;                    // in front of low
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    const auto at = order_.begin();
    std::nth_element(at + low, at + middle, at + high);
    uint32_t half = 0;
    for (size_t i = low; i <= middle; ++i) half += tree_->supers[order_[i].second].page_count;
    if (pages + half >= scan_pages) {
      high = middle;
    } else {
      pages += half;
      low = middle + 1;
    }
  }
  // The super at the border reaches the number wanted.
  const size_t end = std::min(order_.size(), low + (scan_pages > 0 ? 1 : 0));
  for (size_t i = 0; i < end; ++i) super_scanned_[order_[i].second] = 1;
}

void Search::ScanPages() {
  const NodeTable& nodes = tree_->leaves;
  slots_ = static_cast<uint32_t>(blocks_.size()) * kBlockRows;
  block_keys_.clear();
  block_scales_.clear();
  for (uint32_t block : blocks_) {
    block_keys_.push_back(nodes.keys.row(block));
    block_scales_.push_back(nodes.scale.data() + size_t{block} * kBlockRows);
  }
  centre_.resize(size_t{group_} * slots_);
  mass_.resize(size_t{group_} * slots_);
  ScoreBlocks(coarse_, block_keys_.data(), block_scales_.data(),
              static_cast<uint32_t>(blocks_.size()), base_.data(), centre_.data(), slots_);
  const uint32_t supers = tree_->super_count();
  for (uint32_t g = 0; g < group_; ++g) {
    float* mass = mass_.data() + size_t{g} * slots_;
    float* rest = super_mass_.data() + size_t{g} * supers;
    const float top = EstimateLogMasses(blocks_.data(), blocks_.size(), nodes.spread.data(),
                                        nodes.log_count.data(), rho_[g],
                                        centre_.data() + size_t{g} * slots_, mass);
    ref_[g] = std::max(top, MaxOf(rest, supers));
    const float sum = ExpShifted(mass, slots_, ref_[g], mass);
    SetTotals(g, sum + ExpShifted(rest, supers, ref_[g], rest));
  }
}

// rank_ = log of the share of a head's mass that a token far above its page's mean would have,
// largest over the group.
void Search::RankByPromise() {
  const NodeTable& nodes = tree_->leaves;
  rank_.resize(slots_);
  spare_.resize(slots_);
  for (uint32_t g = 0; g < group_; ++g) {
    EstimateTops(blocks_.data(), blocks_.size(), nodes.spread.data(), nodes.log_count.data(),
                 kOptimism * rho_[g], -std::log(indexed_[g]) - ref_[g],
                 centre_.data() + size_t{g} * slots_, spare_.data());
    MaxScaled(spare_.data(), slots_, 1.0f, g == 0, rank_.data());
  }
}

// The pages to sketch, by scanned slot.
void Search::ChooseSketched() {
  const bool whole = SketchDims(tree_->head_dim) == tree_->head_dim;
  sketch_all_ = whole && options_->sketch_pages >= scanned_pages_;
  sketch_count_ = slots_;
  if (sketch_all_) return;
  RankByPromise();
  const float least = whole ? -std::numeric_limits<float>::max() : std::log(kWorthSketching);
  sketch_slot_.resize(slots_ + kBlockRows);
  sketch_slot_.resize(IndicesAtLeast(rank_.data(), slots_, least, sketch_slot_.data()));
  if (sketch_slot_.size() > options_->sketch_pages) {
    TopSlots(rank_, options_->sketch_pages);
    sketch_slot_.assign(candidates_.begin(), candidates_.end());
    std::sort(sketch_slot_.begin(), sketch_slot_.end());
  }
  sketch_count_ = static_cast<uint32_t>(sketch_slot_.size());
}

void Search::Sketch() {
  ChooseSketched();
  ScoreSketched();
  for (uint32_t g = 0; g < group_; ++g) {
    // Rows of absurd size can leave a sketch far above its page's estimate: keep masses near one.
    const float top = MaxOf(mass_.data() + size_t{g} * slots_, slots_);
    if (top > 1e6f) Rescale(g, ref_[g] + std::log(top), 1.0f / top);
  }
}

void Search::ScoreSketched() {
  const uint32_t count = sketch_count_;
  sketch_stride_ = (size_t{count} + kBlockRows - 1) / kBlockRows * kBlockRows;
  sketch_pages_.resize(count);
  sketch_spread_.assign(sketch_stride_, 0.0f);
  sketch_centre_.resize(group_ * sketch_stride_);
  sketch_sum_.resize(sketch_all_ ? 0 : group_ * sketch_stride_);
  sketch_ref_ = ref_;
  for (uint32_t m = 0; m < count; ++m) {
    const uint32_t index = PageOf(SketchSlot(m));
    if (index == kNone) {
      sketch_pages_[m] = {tree_->sketches.row(0), 0.0f, 0};
      continue;
    }
    const Page& page = tree_->pages[index];
    sketch_pages_[m] = {tree_->sketches.row(index), page.sketch_scale, page.count};
    sketch_spread_[m] = page.rest_spread;
  }
  for (uint32_t g = 0; g < group_; ++g) {
    float* centre = sketch_centre_.data() + g * sketch_stride_;
    const float* from = centre_.data() + size_t{g} * slots_;
    if (sketch_all_) {
      std::copy_n(from, count, centre);
    } else {
      for (uint32_t m = 0; m < count; ++m) centre[m] = from[sketch_slot_[m]];
    }
    std::fill(centre + count, centre + sketch_stride_, 0.0f);
    AddSpreadGains(sketch_spread_.data(), sketch_stride_, rest_rho_[g], -ref_[g], centre);
  }
  SumSketched();
}

// Masses of sketched pages from their tokens; of those without a token of any weight, as they were.
void Search::SumSketched() {
  const uint32_t count = sketch_count_;
  float* sum = sketch_all_ ? mass_.data() : sketch_sum_.data();
  for (uint32_t g = 0; !sketch_all_ && g < group_; ++g) {
    const float* mass = mass_.data() + size_t{g} * slots_;
    for (uint32_t m = 0; m < count; ++m) sum[g * sketch_stride_ + m] = mass[sketch_slot_[m]];
  }
  if (request_->rank == GroupRank::kMaxToken) {
    sketch_top_.resize(group_ * sketch_stride_);
    SumSketchesWithTops(fine_, sketch_pages_.data(), count, sketch_centre_.data(), sketch_stride_,
                        sum, sketch_top_.data());
  } else {
    float least[limits::kGroupMax];
    for (uint32_t g = 0; g < group_; ++g) least[g] = std::log(kNegligibleToken * indexed_[g]);
    SumSketches(fine_, sketch_pages_.data(), count, sketch_centre_.data(), least, sketch_stride_,
                sum);
  }
  for (uint32_t g = 0; !sketch_all_ && g < group_; ++g) {
    float* mass = mass_.data() + size_t{g} * slots_;
    for (uint32_t m = 0; m < count; ++m) mass[sketch_slot_[m]] = sum[g * sketch_stride_ + m];
  }
}

// Makes masses of head g relative to exp(ref), which lowers them by `shrink`.
void Search::Rescale(uint32_t g, float ref, float shrink) {
  const size_t supers = tree_->super_count();
  for (uint32_t i = 0; i < slots_; ++i) mass_[size_t{g} * slots_ + i] *= shrink;
  for (size_t s = 0; s < supers; ++s) super_mass_[g * supers + s] *= shrink;
  indexed_[g] *= shrink;
  local_[g] *= shrink;
  ref_[g] = ref;
}

void Search::ReadCandidates() {
  const auto count = static_cast<uint32_t>(candidates_.size());
  const size_t stride = size_t{count} * kPageRows;
  logits_.assign(size_t{group_} * stride, kMinusInfinity);
  candidate_mass_.resize(size_t{group_} * count);
  candidate_top_.resize(size_t{group_} * count);
  candidate_read_.assign(count, 0);
  for (uint32_t c = 0; c < std::min(count, kPagesAhead); ++c) {
    Prefetch(kv_->pages[PageOf(candidates_[c])].k, kPageRows * kv_->row_bytes());
  }
  for (uint32_t c = 0; c < count; ++c) {
    if (c + kPagesAhead < count) {
      Prefetch(kv_->pages[PageOf(candidates_[c + kPagesAhead])].k, kPageRows * kv_->row_bytes());
    }
    const PageView& page = kv_->pages[PageOf(candidates_[c])];
    out_->read.emplace_back(PageOf(candidates_[c]));
    if (page.k == nullptr) continue;
    candidate_read_[c] = 1;
    out_->tokens_read += page.fill;
    DotRows(request_->queries, group_, page.k, kv_->dtype, page.fill, dim_,
            logits_.data() + size_t{c} * kPageRows, stride);
  }
  bool resum = false;
  for (uint32_t g = 0; g < group_; ++g) {
    float* row = logits_.data() + g * stride;
    float* mass = mass_.data() + size_t{g} * slots_;
    for (size_t t = 0; t < stride; ++t) row[t] = Sane(row[t]);
    const float ref = std::max(ref_[g], MaxOf(row, stride));
    if (ref > ref_[g]) Rescale(g, ref, std::exp(ref_[g] - ref));
    ExpShifted(row, stride, ref, row);
    double gain = 0;
    for (uint32_t c = 0; c < count; ++c) {
      const float sum = Sum16(row + size_t{c} * kPageRows);
      const float top = Max16(row + size_t{c} * kPageRows);
      float& estimate = mass[candidates_[c]];
      candidate_mass_[size_t{g} * count + c] = candidate_read_[c] != 0 ? sum : estimate;
      candidate_top_[size_t{g} * count + c] = candidate_read_[c] != 0 ? top : estimate;
      gain += double{candidate_mass_[size_t{g} * count + c]} - estimate;
      estimate = candidate_mass_[size_t{g} * count + c];
    }
    // Where estimates were far too high, the difference has no digits left.
    const double indexed = indexed_[g] + gain;
    resum = resum || indexed < 0.01 * indexed_[g];
    indexed_[g] = std::max(static_cast<float>(indexed), 1e-30f);
    total_[g] = indexed_[g] + local_[g];
  }
  if (resum) Totals();
  for (uint32_t c = 0; c < count; ++c) {
    float share = 0;
    for (uint32_t g = 0; g < group_; ++g)
      share = std::max(share, candidate_mass_[size_t{g} * count + c] / indexed_[g]);
    share_[candidates_[c]] = share;
  }
}

void Search::Choose() {
  const auto count = static_cast<uint32_t>(candidates_.size());
  const bool by_token = request_->rank == GroupRank::kMaxToken;
  order_.clear();
  uint32_t rows_unchosen = 0;
  for (uint32_t c = 0; c < count; ++c) {
    float rank = 0;
    for (uint32_t g = 0; g < group_; ++g) {
      const size_t at = size_t{g} * count + c;
      const float x = (by_token ? candidate_top_[at] : candidate_mass_[at]) / total_[g];
      rank = request_->rank == GroupRank::kMassSum ? rank + x : std::max(rank, x);
    }
    order_.emplace_back(rank, c);
    rows_unchosen += candidate_read_[c] != 0 ? tree_->pages[PageOf(candidates_[c])].count : 0;
  }
  const uint32_t taken = std::min(count, max_pages_);
  std::partial_sort(
      order_.begin(), order_.begin() + taken, order_.end(), [&](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first
                                  : PageOf(candidates_[a.second]) < PageOf(candidates_[b.second]);
      });
  candidate_chosen_.assign(count, 0);
  float missing = 0, covered = 0;
  for (uint32_t g = 0; g < group_; ++g) missing += indexed_[g] / total_[g];
  const float allowed = (1.0f - request_->min_mass) * static_cast<float>(group_);
  for (uint32_t n = 0; n < taken; ++n) {
    // A page that was read may stay behind only within the cap on exact reads.
    if (request_->min_mass > 0 && missing <= allowed && rows_unchosen <= request_->read_cap) break;
    const uint32_t c = order_[n].second;
    const uint32_t page = PageOf(candidates_[c]);
    float log_mass = kMinusInfinity;
    for (uint32_t g = 0; g < group_; ++g) {
      const float mass = candidate_mass_[size_t{g} * count + c];
      // Below the smallest float, say so rather than "none".
      log_mass = std::max(log_mass, mass > 0 ? std::log(mass) + ref_[g] : ref_[g] - 100.0f);
      missing -= mass / total_[g];
      covered += mass / std::max(indexed_[g], 1e-30f);
    }
    out_->pages.push_back({PageId(page), log_mass});
    candidate_chosen_[c] = 1;
    if (candidate_read_[c] != 0) rows_unchosen -= tree_->pages[page].count;
  }
  unreturned_ = rows_unchosen;
  out_->covered_mass = std::clamp(covered / static_cast<float>(group_), 0.0f, 1.0f);
}

void Select(const Tree& tree, const ClusterTreeOptions& options, const SelectRequest& request,
            const PagedKv& pages, Selection* out) {
  thread_local Search search;
  search.Run(tree, options, request, pages, out);
}

}  // namespace icecache::cluster_tree
