// The part of Select that ranks scanned pages by their estimates and says how many to look at.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cacheserver/select/cluster_tree_search.h"
#include "kernels/page_mass.h"

namespace icecache::cluster_tree {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kWorthReading = 1e-4f;  // estimated share (of its best token) to re-rank a page
constexpr double kRerankGrowth = 4.0;   // more pages are re-ranked when a slice has doubled
constexpr float kFloorSlack = 0.15f;    // how far a page's log mass may be above its estimate
constexpr float kTopOfPage = 1.5f;  // standard deviations of the best of 16 above the mean, about

size_t CountAtLeast(const float* x, size_t count, float bound) {
  size_t n = 0;
  for (size_t i = 0; i < count; ++i) n += x[i] >= bound ? 1 : 0;
  return n;
}

}  // namespace

// indexed_ and total_ of head g, whose masses sum to `indexed`.
void Search::SetTotals(uint32_t g, float indexed) {
  indexed_[g] = std::max(indexed, 1e-30f);
  local_[g] = request_->local_lse == nullptr
                  ? 0.0f
                  : std::exp(std::min(Sane(request_->local_lse[g]) - ref_[g], 80.0f));
  total_[g] = indexed_[g] + local_[g];
}

// The same after masses have changed.
void Search::Totals() {
  const uint32_t supers = tree_->super_count();
  block_sums_.resize(blocks_.size());
  for (uint32_t g = 0; g < group_; ++g) {
    SumBlocks(mass_.data() + size_t{g} * slots_, blocks_.size(), block_sums_.data());
    const float* rest = super_mass_.data() + size_t{g} * supers;
    const double sum = std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
    SetTotals(g, static_cast<float>(std::accumulate(rest, rest + supers, sum)));
  }
}

// share_ from the masses as they stand.
void Search::Shares() {
  share_.resize(slots_);
  for (uint32_t g = 0; g < group_; ++g) {
    MaxScaled(mass_.data() + size_t{g} * slots_, slots_, 1.0f / indexed_[g], g == 0, share_.data());
  }
}

// rank_ by the request's rule.
void Search::Rank() {
  rank_.resize(slots_);
  if (request_->rank == GroupRank::kMaxToken) return RankByToken();
  const bool sum_heads = request_->rank == GroupRank::kMassSum;
  for (uint32_t g = 0; g < group_; ++g) {
    (sum_heads ? AddScaled : MaxScaled)(mass_.data() + size_t{g} * slots_, slots_, 1.0f / total_[g],
                                        g == 0, rank_.data());
  }
}

// What at least `count` of rank[blocks * 16] reach, if there are so many; a lower bound on the
// count-th largest. Divides the slots in groups: the count-th largest maximum of a group is such a
// bound. A group is one lane of `depth` blocks, so that maxima need no shuffles.
float Search::BoundOfTop(const float* rank, size_t blocks, uint32_t count) {
  const size_t depth = std::clamp<size_t>(blocks * kBlockRows / (4 * size_t{count}), 1, 16);
  const size_t groups = (blocks + depth - 1) / depth * kBlockRows;
  if (groups <= count) return kMinusInfinity;
  maxima_.resize(groups);
  MaxOfBlockGroups(rank, blocks, depth, maxima_.data());
  std::nth_element(maxima_.begin(), maxima_.begin() + (count - 1), maxima_.end(), std::greater<>());
  return maxima_[count - 1];
}

// Leaves the `count` slots of largest rank in candidates_, best first when a mass is wanted; empty
// slots never.
void Search::TopSlots(const std::vector<float>& rank, uint32_t count) {
  candidates_.clear();
  if (count == 0) return;
  const float bound = BoundOfTop(rank.data(), blocks_.size(), count);
  found_.resize(slots_ + kBlockRows);
  const size_t found = IndicesAtLeast(rank.data(), slots_, bound, found_.data());
  order_.clear();
  for (size_t f = 0; f < found; ++f) {
    if (PageOf(found_[f]) != kNone) order_.emplace_back(-rank[found_[f]], found_[f]);
  }
  if (order_.size() > count) {
    std::nth_element(order_.begin(), order_.begin() + count, order_.end());
    order_.resize(count);
  }
  if (request_->min_mass > 0) std::sort(order_.begin(), order_.end());
  for (const auto& [negative, slot] : order_) candidates_.push_back(slot);
}

// With min_mass: how many of candidates_ are needed by estimate.
uint32_t Search::PagesByEstimate() const {
  float missing = 0;
  for (uint32_t g = 0; g < group_; ++g) missing += indexed_[g] / total_[g];
  const float allowed = (1.0f - request_->min_mass) * static_cast<float>(group_);
  uint32_t n = 0;
  while (n < candidates_.size() && missing > allowed) {
    for (uint32_t g = 0; g < group_; ++g)
      missing -= mass_[size_t{g} * slots_ + candidates_[n]] / total_[g];
    ++n;
  }
  return n;
}

// rank_ = log of the estimated best token of a page, from its sketch or from its spread.
void Search::RankByToken() {
  const NodeTable& nodes = tree_->leaves;
  spare_.resize(slots_);
  for (uint32_t g = 0; g < group_; ++g) {
    float* rank = g == 0 ? rank_.data() : spare_.data();
    EstimateTops(blocks_.data(), blocks_.size(), nodes.spread.data(), nodes.log_count.data(),
                 kTopOfPage * rho_[g], -std::log(total_[g]) - ref_[g],
                 centre_.data() + size_t{g} * slots_, rank);
    const float shift = sketch_count_ == 0 ? 0.0f : sketch_ref_[g] - ref_[g];
    for (uint32_t m = 0; m < sketch_count_; ++m) {
      const float top = sketch_top_[g * sketch_stride_ + m];
      rank[SketchSlot(m)] = top > 0 ? std::log(top / total_[g]) + shift : -100.0f;
    }
    if (g > 0) MaxScaled(rank, slots_, 1.0f, false, rank_.data());
  }
}

// How many pages beyond those returned may hold something of weight. Pages lose purity as a slice
// grows; until it is clustered anew, looking at more of them makes up for it.
uint32_t Search::PagesWorthReading() const {
  const bool by_token = request_->rank == GroupRank::kMaxToken;
  const size_t worth =
      CountAtLeast(rank_.data(), slots_, by_token ? std::log(kWorthReading) : kWorthReading);
  const auto built = static_cast<double>(std::max<uint64_t>(1, tree_->basis.tokens));
  const double growth = std::max(0.0, static_cast<double>(tree_->tokens) / built - 1);
  const auto least = static_cast<uint32_t>(std::min<double>(
      options_->rerank_pages_max, options_->rerank_pages_min * (1 + kRerankGrowth * growth)));
  return static_cast<uint32_t>(std::clamp<size_t>(worth - std::min<size_t>(worth, max_pages_),
                                                  least, options_->rerank_pages_max));
}

// How many pages may pass SelectRequest::floor by estimate, max_pages_ at most.
uint32_t Search::PagesAboveFloor() const {
  float least[limits::kGroupMax];
  for (uint32_t g = 0; g < group_; ++g)
    least[g] = std::exp(std::min(request_->floor - kFloorSlack - ref_[g], 80.0f));
  uint32_t above = 0;
  for (uint32_t i = 0; i < slots_ && above < max_pages_; ++i) {
    bool passes = false;
    for (uint32_t g = 0; g < group_; ++g) passes |= mass_[size_t{g} * slots_ + i] >= least[g];
    above += passes ? 1 : 0;
  }
  return above;
}

void Search::Candidates() {
  Rank();
  if (request_->floor > kMinusInfinity) max_pages_ = PagesAboveFloor();
  uint32_t extra = tree_->basis.sketched() ? options_->rerank_pages_sketch : PagesWorthReading();
  extra = read_all_ ? tree_->page_count() : std::min(extra, request_->read_cap / kPageRows);
  TopSlots(rank_, std::min(tree_->page_count(), max_pages_ + extra));
  if (request_->min_mass > 0) {
    // The pages re-ranked beyond them make up where estimates promised too much; see Choose.
    const uint32_t wanted = std::min(max_pages_, PagesByEstimate());
    if (candidates_.size() > wanted + extra) candidates_.resize(wanted + extra);
  }
}

}  // namespace icecache::cluster_tree
