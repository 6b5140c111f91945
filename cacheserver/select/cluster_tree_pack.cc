// Content packing: which tokens share a page.
//
//   parts    slices over 32k tokens are first divided among coarse centroids, which bounds memory
//   and keeps the
//            cost per token level
//   supers   k-means trained on a sample, about 448 tokens each; small ones are dissolved
//   pages    each super is bisected by two-means down to 16 tokens, cut at multiples of a page, so
//   that only
//            one page of a super is not full
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"
#include "kernels/nearest.h"

namespace icecache::cluster_tree {

namespace {

constexpr uint32_t kPartTokens = 32768;
constexpr uint32_t kSuperTokens = 448;
constexpr uint32_t kSuperTokensMin = 192;
constexpr uint32_t kSamplePerCentroid = 24;
constexpr int kTrainPasses = 4;
constexpr int kBisectPasses = 3;
constexpr uint32_t kSuperPagesMax = 48;
constexpr float kEnergyKept =
    0.97f;  // of the metric's variance, by the dimensions that packing looks at
constexpr uint32_t kValueDims = 32;  // random projections of the value

using Rng = std::mt19937_64;

// Points to be packed: x[count, dim], point i being token ids[i].
struct Points {
  uint32_t dim = 0;
  std::vector<uint32_t> ids;
  std::vector<float> x;
  uint32_t count() const { return static_cast<uint32_t>(ids.size()); }
  const float* row(size_t i) const { return x.data() + i * dim; }
  float* row(size_t i) { return x.data() + i * dim; }
};

// Turns stored rows into points of the metric's leading dimensions, plus projected values.
class Projection {
 public:
  Projection(const TokenRows& rows, const Basis& basis, float value_share, Rng& rng)
      : rows_(rows), basis_(basis), buffer_(rows.head_dim) {
    ChooseDims();
    if (value_share > 0) ChooseValues(value_share, rng);
    dim_ = (static_cast<uint32_t>(dims_.size()) + value_dims_ + 15) / 16 * 16;
  }

  void Load(Points* points) {
    points->dim = dim_;
    points->x.assign(size_t{points->count()} * dim_, 0.0f);
    for (uint32_t i = 0; i < points->count(); ++i) LoadRow(points->ids[i], points->row(i));
  }

 private:
  void ChooseDims() {
    const uint32_t dim = rows_.head_dim;
    std::vector<uint32_t> order(dim);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return basis_.weight[a] > basis_.weight[b]; });
    const float total = std::accumulate(basis_.weight.begin(), basis_.weight.end(), 0.0f);
    float kept = 0;
    for (uint32_t j : order) {
      if (kept >= kEnergyKept * total) break;
      kept += basis_.weight[j];
      dims_.push_back(j);
    }
    while (dims_.size() % 16 != 0)
      dims_.push_back(order[dims_.size()]);  // free: rows are padded to that anyway
    std::sort(dims_.begin(), dims_.end());
    factor_.resize(dims_.size());
    for (size_t i = 0; i < dims_.size(); ++i) factor_[i] = std::sqrt(basis_.weight[dims_[i]]);
  }

  void ChooseValues(float share, Rng& rng) {
    value_dims_ = kValueDims;
    directions_.resize(size_t{kValueDims} * rows_.head_dim);
    for (float& d : directions_) d = (rng() & 1) != 0 ? 1.0f : -1.0f;
    double square = 0, key = 0;
    float projected[kValueDims];
    const uint32_t sample = std::min(rows_.count, 512u);
    for (uint32_t i = 0; i < sample; ++i) {
      Project(size_t{i} * rows_.count / sample, projected);
      for (float p : projected) square += double{p} * p / sample;
    }
    for (float f : factor_) key += double{f} * f;
    value_factor_ = square > 0 ? static_cast<float>(std::sqrt(share * key / square)) : 0.0f;
  }

  void Project(size_t token, float* out) {
    ToF32(rows_.v + token * rows_.row_bytes(), rows_.dtype, rows_.head_dim, buffer_.data());
    for (uint32_t j = 0; j < rows_.head_dim; ++j) buffer_[j] -= basis_.value_mean[j];
    DotRows(buffer_.data(), 1, reinterpret_cast<const std::byte*>(directions_.data()), DType::kF32,
            kValueDims, rows_.head_dim, out, kValueDims);
  }

  void LoadRow(uint32_t token, float* x) {
    ToF32(rows_.k + token * rows_.row_bytes(), rows_.dtype, rows_.head_dim, buffer_.data());
    ToCoordinates(basis_, buffer_.data(), buffer_.data());
    for (size_t i = 0; i < dims_.size(); ++i) x[i] = buffer_[dims_[i]] * factor_[i];
    if (value_dims_ == 0) return;
    float* values = x + dims_.size();
    Project(token, values);
    for (uint32_t i = 0; i < value_dims_; ++i) values[i] *= value_factor_;
  }

  const TokenRows& rows_;
  const Basis& basis_;
  std::vector<float> buffer_;
  std::vector<uint32_t> dims_;
  std::vector<float> factor_, directions_;
  float value_factor_ = 0;
  uint32_t value_dims_ = 0, dim_ = 0;
};

// Lloyd's iterations over points; centroids[count, dim] start at random distinct points.
std::vector<float> TrainCentroids(const Points& points, uint32_t count, Rng& rng) {
  const uint32_t dim = points.dim;
  std::vector<float> centroids(size_t{count} * dim);
  for (uint32_t c = 0; c < count; ++c) {
    // One point from each stretch of the sample: distinct, and spread over the positions.
    const size_t low = size_t{c} * points.count() / count;
    const size_t high = std::max(low + 1, size_t{c + 1} * points.count() / count);
    std::copy_n(points.row(low + rng() % (high - low)), dim, centroids.data() + size_t{c} * dim);
  }
  CentroidPanels panels;
  std::vector<uint32_t> best(points.count()), sizes(count);
  for (int pass = 0; pass < kTrainPasses; ++pass) {
    panels.Assign(centroids.data(), count, dim);
    Nearest(panels, points.x.data(), dim, points.count(), best.data(), nullptr);
    std::fill(centroids.begin(), centroids.end(), 0.0f);
    std::fill(sizes.begin(), sizes.end(), 0u);
    for (uint32_t i = 0; i < points.count(); ++i) {
      float* c = centroids.data() + size_t{best[i]} * dim;
      const float* x = points.row(i);
      for (uint32_t j = 0; j < dim; ++j) c[j] += x[j];
      ++sizes[best[i]];
    }
    for (uint32_t c = 0; c < count; ++c) {
      float* to = centroids.data() + size_t{c} * dim;
      if (sizes[c] == 0)
        std::copy_n(points.row(rng() % points.count()), dim, to);
      else
        for (uint32_t j = 0; j < dim; ++j) to[j] /= static_cast<float>(sizes[c]);
    }
  }
  return centroids;
}

// An evenly spaced sample of the points' tokens, loaded.
Points SamplePoints(const std::vector<uint32_t>& ids, uint32_t sample, Projection& projection) {
  Points points;
  for (uint32_t i = 0; i < sample; ++i) points.ids.push_back(ids[size_t{i} * ids.size() / sample]);
  projection.Load(&points);
  return points;
}

// Bisects one super's points into pages.
class Bisector {
 public:
  Bisector(uint32_t dim, Packing* out) : dim_(dim), out_(out) {}

  void Run(Points points) {
    points_ = std::move(points);
    const uint32_t n = points_.count();
    spare_.resize(size_t{n} * dim_);
    projection_.resize(n);
    Cut(0, n, false);
  }

 private:
  // Orders [begin, end) in pages. in_super: an enclosing range has already opened the super.
  void Cut(uint32_t begin, uint32_t end, bool in_super) {
    const uint32_t n = end - begin;
    const uint32_t pages = (n + kPageRows - 1) / kPageRows;
    if (!in_super && pages <= kSuperPagesMax) {
      out_->super_begin.push_back(static_cast<uint32_t>(out_->layout.page_begin.size()));
      in_super = true;
    }
    if (n <= kPageRows) {
      out_->layout.page_begin.push_back(static_cast<uint32_t>(out_->layout.tokens.size()));
      for (uint32_t i = begin; i < end; ++i) out_->layout.tokens.push_back(points_.ids[i]);
      return;
    }
    const uint32_t left = TwoMeans(begin, end);
    Cut(begin, begin + left, in_super);
    Cut(begin + left, end, in_super);
  }

  // Sorts the range along the line between two means; returns the size of the left side,
  // page-aligned.
  uint32_t TwoMeans(uint32_t begin, uint32_t end) {
    const uint32_t n = end - begin;
    std::vector<float> line(dim_), low(dim_), high(dim_);
    FarPoints(begin, end, low.data(), high.data());
    uint32_t natural = n / 2;
    for (int pass = 0; pass < kBisectPasses; ++pass) {
      float middle = 0;
      for (uint32_t j = 0; j < dim_; ++j) {
        line[j] = high[j] - low[j];
        middle += 0.5f * (high[j] * high[j] - low[j] * low[j]);
      }
      Project(begin, n, line.data());
      natural = Means(begin, n, middle, low.data(), high.data());
      if (natural == 0 || natural == n) break;
    }
    return SortAndCut(begin, n, natural);
  }

  void Project(uint32_t begin, uint32_t n, const float* line) {
    DotRows(line, 1, reinterpret_cast<const std::byte*>(points_.row(begin)), DType::kF32, n, dim_,
            projection_.data(), n);
  }

  // low = the point farthest from the range's first, high = the one farthest from low.
  void FarPoints(uint32_t begin, uint32_t end, float* low, float* high) {
    const auto farthest = [&](const float* from) {
      uint32_t best = begin;
      Project(begin, end - begin, from);
      float least = 0;
      for (uint32_t i = begin; i < end; ++i) {
        const float score = projection_[i - begin];
        if (i == begin || score < least) {
          least = score;
          best = i;
        }
      }
      return points_.row(best);
    };
    std::copy_n(farthest(points_.row(begin)), dim_, low);
    std::copy_n(farthest(low), dim_, high);
  }

  // Means of the points on either side of `middle`; returns how many lie below.
  uint32_t Means(uint32_t begin, uint32_t n, float middle, float* low, float* high) {
    std::vector<float> sum(size_t{2} * dim_, 0.0f);
    uint32_t below = 0;
    for (uint32_t i = 0; i < n; ++i) {
      const bool is_high = projection_[i] > middle;
      below += is_high ? 0 : 1;
      float* to = sum.data() + (is_high ? dim_ : 0);
      const float* x = points_.row(begin + i);
      for (uint32_t j = 0; j < dim_; ++j) to[j] += x[j];
    }
    if (below == 0 || below == n) return below;
    for (uint32_t j = 0; j < dim_; ++j) low[j] = sum[j] / static_cast<float>(below);
    for (uint32_t j = 0; j < dim_; ++j) high[j] = sum[dim_ + j] / static_cast<float>(n - below);
    return below;
  }

  // The cut nearest to `natural` that leaves at most one page that is not full.
  static uint32_t AlignedCut(uint32_t n, uint32_t natural) {
    const uint32_t rest = n % kPageRows;
    uint32_t best = kPageRows;
    for (uint32_t full = 0; full < n; full += kPageRows) {
      for (uint32_t cut : {full, full + rest}) {
        if (cut == 0 || cut >= n) continue;
        const auto miss = [&](uint32_t c) { return c > natural ? c - natural : natural - c; };
        if (miss(cut) < miss(best)) best = cut;
      }
    }
    return best;
  }

  uint32_t SortAndCut(uint32_t begin, uint32_t n, uint32_t natural) {
    const uint32_t cut = AlignedCut(n, natural);
    order_.resize(n);
    std::iota(order_.begin(), order_.end(), 0u);
    std::nth_element(
        order_.begin(), order_.begin() + cut, order_.end(), [&](uint32_t a, uint32_t b) {
          return projection_[a] != projection_[b] ? projection_[a] < projection_[b] : a < b;
        });
    std::vector<uint32_t> ids(n);
    for (uint32_t i = 0; i < n; ++i) {
      ids[i] = points_.ids[begin + order_[i]];
      std::memcpy(spare_.data() + size_t{i} * dim_, points_.row(begin + order_[i]),
                  dim_ * sizeof(float));
    }
    std::copy(ids.begin(), ids.end(), points_.ids.begin() + begin);
    std::memcpy(points_.row(begin), spare_.data(), size_t{n} * dim_ * sizeof(float));
    return cut;
  }

  const uint32_t dim_;
  Packing* out_;
  Points points_;
  std::vector<float> spare_, projection_;
  std::vector<uint32_t> order_;
};

// Nearest centroid of every point, then centroids with few points dissolved and theirs dealt out
// again.
std::vector<uint32_t> AssignSupers(const Points& points, std::vector<float> centroids,
                                   uint32_t* count) {
  const uint32_t dim = points.dim;
  std::vector<uint32_t> best(points.count()), sizes(*count, 0), renamed(*count, kNone);
  CentroidPanels panels;
  panels.Assign(centroids.data(), *count, dim);
  Nearest(panels, points.x.data(), dim, points.count(), best.data(), nullptr);
  for (uint32_t b : best) ++sizes[b];
  uint32_t kept = 0;
  for (uint32_t c = 0; c < *count; ++c) {
    if (sizes[c] < kSuperTokensMin) continue;
    renamed[c] = kept;
    std::copy_n(centroids.begin() + size_t{c} * dim, dim, centroids.begin() + size_t{kept} * dim);
    ++kept;
  }
  if (kept == 0) {
    *count = 1;
    return std::vector<uint32_t>(points.count(), 0);
  }
  panels.Assign(centroids.data(), kept, dim);
  for (uint32_t i = 0; i < points.count(); ++i) {
    if (renamed[best[i]] != kNone)
      best[i] = renamed[best[i]];
    else
      Nearest(panels, points.row(i), dim, 1, &best[i], nullptr);
  }
  *count = kept;
  return best;
}

// Members of each of `count` groups, in order.
std::vector<std::vector<uint32_t>> Group(const std::vector<uint32_t>& group_of, uint32_t count) {
  std::vector<std::vector<uint32_t>> members(count);
  for (uint32_t i = 0; i < group_of.size(); ++i) members[group_of[i]].push_back(i);
  return members;
}

void PackPart(std::vector<uint32_t> ids, Projection& projection, Rng& rng, Packing* out) {
  Points points;
  points.ids = std::move(ids);
  projection.Load(&points);
  uint32_t supers = std::max(1u, points.count() / kSuperTokens);
  const uint32_t sample = std::min(points.count(), supers * kSamplePerCentroid);
  const Points train = SamplePoints(points.ids, sample, projection);
  const std::vector<uint32_t> super_of =
      AssignSupers(points, TrainCentroids(train, supers, rng), &supers);
  Bisector bisector(points.dim, out);
  for (const std::vector<uint32_t>& members : Group(super_of, supers)) {
    if (members.empty()) continue;
    Points local;
    local.dim = points.dim;
    local.x.reserve(members.size() * points.dim);
    for (uint32_t m : members) {
      local.ids.push_back(points.ids[m]);
      local.x.insert(local.x.end(), points.row(m), points.row(m) + points.dim);
    }
    bisector.Run(std::move(local));
  }
}

// Divides the tokens among coarse centroids, a block of rows at a time.
std::vector<std::vector<uint32_t>> Parts(uint32_t count, Projection& projection, Rng& rng) {
  std::vector<uint32_t> all(count);
  std::iota(all.begin(), all.end(), 0u);
  const uint32_t parts = (count + kPartTokens - 1) / kPartTokens;
  if (parts <= 1) return {std::move(all)};
  const Points train = SamplePoints(all, parts * 128, projection);
  CentroidPanels panels;
  panels.Assign(TrainCentroids(train, parts, rng).data(), parts, train.dim);
  std::vector<uint32_t> part_of(count);
  constexpr uint32_t kBlock = 512;
  for (uint32_t first = 0; first < count; first += kBlock) {
    Points block;
    const uint32_t n = std::min(kBlock, count - first);
    block.ids.assign(all.begin() + first, all.begin() + first + n);
    projection.Load(&block);
    Nearest(panels, block.x.data(), block.dim, n, part_of.data() + first, nullptr);
  }
  return Group(part_of, parts);
}

}  // namespace

Packing PackContent(const TokenRows& rows, const Basis& basis, float value_share, uint64_t seed) {
  Packing packing;
  Rng rng(seed);
  packing.layout.tokens.reserve(rows.count);
  Projection projection(rows, basis, value_share, rng);
  for (std::vector<uint32_t>& part : Parts(rows.count, projection, rng)) {
    if (!part.empty()) PackPart(std::move(part), projection, rng, &packing);
  }
  packing.super_begin.push_back(static_cast<uint32_t>(packing.layout.page_begin.size()));
  packing.layout.page_begin.push_back(rows.count);
  return packing;
}

}  // namespace icecache::cluster_tree
