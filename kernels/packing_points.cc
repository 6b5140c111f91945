#include "kernels/packing_points.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/distance.h"

namespace icecache::packing {

namespace {
constexpr int kTrainPasses = 4;
constexpr int kBisectPasses = 3;
constexpr float kEnergyKept =
    0.97f;  // of the metric's variance, by the dimensions that packing looks at
constexpr uint32_t kValueDims = 32;  // of the value's sketch
constexpr uint32_t kRowStep = 16;    // kernels want dimensions in multiples of this
}  // namespace

Projection::Projection(const TokenRows& rows, const Basis& basis, float value_share, Rng& rng)
    : rows_(rows), basis_(basis), buffer_(rows.head_dim) {
  ChooseDims();
  if (value_share > 0) ChooseValues(value_share, rng);
  dim_ = static_cast<uint32_t>(dims_.size()) + value_dims_;
  point_.resize(dim_);
}

void Projection::ChooseDims() {
  const uint32_t dim = rows_.head_dim;
  std::vector<uint32_t> order(dim);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return basis_.weight[a] > basis_.weight[b]; });
  const float total = std::accumulate(basis_.weight.begin(), basis_.weight.end(), 0.0f);
  float kept = 0;
  for (uint32_t j : order) {
    if (kept >= kEnergyKept * total && dims_.size() % kRowStep == 0) break;
    kept += basis_.weight[j];
    dims_.push_back(j);
  }
  std::sort(dims_.begin(), dims_.end());
  factor_.resize(dims_.size());
  for (size_t i = 0; i < dims_.size(); ++i) {
    factor_[i] = std::sqrt(basis_.weight[dims_[i]]) / basis_.scale[dims_[i]];
  }
}

void Projection::ChooseValues(float share, Rng& rng) {
  value_dims_ = kValueDims;
  signs_.resize(rows_.head_dim);
  for (float& s : signs_) s = (rng() & 1) != 0 ? 1.0f : -1.0f;
  double square = 0, key = 0;
  float projected[kValueDims];
  const uint32_t sample = std::min(rows_.count, 512u);
  for (uint32_t i = 0; i < sample; ++i) {
    ProjectValue(size_t{i} * rows_.count / sample, projected);
    for (float p : projected) square += double{p} * p / sample;
  }
  for (uint32_t j : dims_) key += basis_.weight[j];
  value_factor_ = square > 0 ? static_cast<float>(std::sqrt(share * key / square)) : 0.0f;
}

// A count sketch: every element goes to one of kValueDims sums with a random sign, which keeps
// distances on average and costs one pass.
void Projection::ProjectValue(size_t token, float* out) {
  ToF32(rows_.v + token * rows_.row_bytes(), rows_.dtype, rows_.head_dim, buffer_.data());
  std::fill_n(out, kValueDims, 0.0f);
  for (uint32_t first = 0; first < rows_.head_dim; first += kRowStep) {
    float* const sums = out + first % kValueDims;
    for (uint32_t i = 0; i < kRowStep; ++i) {
      const uint32_t j = first + i;
      sums[i] += signs_[j] * (buffer_[j] - basis_.value_mean[j]);
    }
  }
}

void Projection::LoadRow(uint32_t token, float* x) {
  ToF32(rows_.k + token * rows_.row_bytes(), rows_.dtype, rows_.head_dim, buffer_.data());
  const float limit = kCoordinateMax * std::sqrt(static_cast<float>(rows_.head_dim));
  const auto element = [&](size_t i, size_t j) {
    const float value = (buffer_[j] - basis_.mean[j]) * factor_[i];
    x[i] = std::min(std::max(value, -limit), limit);
  };
  if (dims_.size() == rows_.head_dim) {
    for (size_t j = 0; j < dims_.size(); ++j) element(j, j);
  } else {
    for (size_t i = 0; i < dims_.size(); ++i) element(i, dims_[i]);
  }
  if (value_dims_ == 0) return;
  float* values = x + dims_.size();
  ProjectValue(token, values);
  for (uint32_t i = 0; i < value_dims_; ++i) values[i] *= value_factor_;
}

void Projection::Load(Points* points) {
  points->dim = dim_;
  points->bytes.resize(points->ids.size() * dim_);
  points->scale.resize(points->ids.size());
  for (size_t i = 0; i < points->ids.size(); ++i) {
    LoadRow(points->ids[i], point_.data());
    points->scale[i] = EncodePoint(point_.data(), dim_, points->bytes.data() + i * dim_);
  }
}

void Points::Encode(std::span<const float> x) {
  bytes.resize(x.size());
  scale.resize(x.size() / dim);
  for (size_t i = 0; i < scale.size(); ++i)
    scale[i] = EncodePoint(x.data() + i * dim, dim, bytes.data() + i * dim);
}

ScratchVector<float> TrainCentroids(const Points& points, uint32_t count, Rng& rng) {
  const uint32_t dim = points.dim;
  ScratchVector<float> centroids(size_t{count} * dim);
  for (uint32_t c = 0; c < count; ++c) {
    const size_t low = size_t{c} * points.count() / count;
    const size_t high = std::max(low + 1, size_t{c + 1} * points.count() / count);
    points.Decode(low + rng() % (high - low), centroids.data() + size_t{c} * dim);
  }
  BytePanels panels;
  std::vector<uint32_t> best(points.count()), sizes(count);
  for (int pass = 0; pass < kTrainPasses; ++pass) {
    panels.Assign(centroids.data(), count, dim);
    Nearest(panels, points.table(), points.count(), best.data(), nullptr);
    std::fill(centroids.begin(), centroids.end(), 0.0f);
    std::fill(sizes.begin(), sizes.end(), 0u);
    AddPointsByIndex(points.table(), points.count(), best.data(), centroids.data());
    for (uint32_t b : best) ++sizes[b];
    for (uint32_t c = 0; c < count; ++c) {
      float* to = centroids.data() + size_t{c} * dim;
      if (sizes[c] == 0) {
        points.Decode(rng() % points.count(), to);
      } else {
        for (uint32_t j = 0; j < dim; ++j) to[j] /= static_cast<float>(sizes[c]);
      }
    }
  }
  return centroids;
}

Groups Group(std::span<const uint32_t> group_of, uint32_t count, std::span<const uint32_t> numbers,
             uint32_t each) {
  Groups groups;
  groups.begin.assign(count + 1, 0);
  groups.members.resize(group_of.size());
  for (uint32_t group : group_of) ++groups.begin[group + 1];
  std::partial_sum(groups.begin.begin(), groups.begin.end(), groups.begin.begin());
  std::vector<uint32_t> at(groups.begin.begin(), groups.begin.end() - 1);
  for (uint32_t i = 0; size_t{i} * each < group_of.size(); ++i) {
    for (const uint32_t group : group_of.subspan(size_t{i} * each, each))
      groups.members[at[group]++] = numbers.empty() ? i : numbers[i];
  }
  return groups;
}

namespace {

// The cut nearest to `natural` that leaves at most one side that is no multiple of align.
uint32_t AlignedCut(uint32_t n, uint32_t natural, uint32_t align) {
  const uint32_t rest = n % align;
  uint32_t best = align;
  const auto miss = [&](uint32_t c) { return c > natural ? c - natural : natural - c; };
  for (uint32_t full = 0; full < n; full += align) {
    for (uint32_t cut : {full, full + rest}) {
      if (cut > 0 && cut < n && miss(cut) < miss(best)) best = cut;
    }
  }
  return best;
}

}  // namespace

// low = the point farthest along the first row's direction away from it, high = the one farthest
// from low in the same sense: two ends of the set, by dot products alone.
void Bisector::FarPoints(std::span<const uint32_t> rows, float* low, float* high) {
  const auto farthest = [&](const float* from) {
    ProjectPoints(from, points_.table(rows.data()), rows.size(), projection_.data());
    const auto least = std::min_element(projection_.begin(),
                                        projection_.begin() + static_cast<ptrdiff_t>(rows.size()));
    return rows[static_cast<size_t>(least - projection_.begin())];
  };
  points_.Decode(rows[0], low);
  points_.Decode(farthest(low), low);
  points_.Decode(farthest(low), high);
}

// Means of the rows on either side of `middle` along projection_; returns how many lie below.
uint32_t Bisector::Means(std::span<const uint32_t> rows, float middle, float* low, float* high) {
  const uint32_t dim = points_.dim;
  uint32_t below = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    side_[i] = projection_[i] > middle ? 1 : 0;
    below += 1 - side_[i];
  }
  if (below == 0 || below == rows.size()) return below;
  means_.assign(size_t{2} * dim, 0.0f);
  AddPointsByIndex(points_.table(rows.data()), rows.size(), side_.data(), means_.data());
  const float low_share = 1.0f / static_cast<float>(below);
  const float high_share = 1.0f / static_cast<float>(rows.size() - below);
  for (uint32_t j = 0; j < dim; ++j) low[j] = means_[j] * low_share;
  for (uint32_t j = 0; j < dim; ++j) high[j] = means_[dim + j] * high_share;
  return below;
}

uint32_t Bisector::Divide(std::span<uint32_t> rows, uint32_t align) {
  const uint32_t dim = points_.dim;
  const auto n = static_cast<uint32_t>(rows.size());
  projection_.resize(std::max<size_t>(projection_.size(), n));
  side_.resize(std::max<size_t>(side_.size(), n));
  line_.resize(size_t{3} * dim);
  float* line = line_.data();
  float* low = line + dim;
  float* high = low + dim;
  FarPoints(rows, low, high);
  uint32_t natural = n / 2;
  for (int pass = 0; pass < kBisectPasses; ++pass) {
    float middle = 0;
    for (uint32_t j = 0; j < dim; ++j) {
      line[j] = high[j] - low[j];
      middle += 0.5f * (high[j] * high[j] - low[j] * low[j]);
    }
    ProjectPoints(line, points_.table(rows.data()), n, projection_.data());
    natural = Means(rows, middle, low, high);
    if (natural == 0 || natural == n) break;
  }
  natural = std::clamp(natural, 1u, n - 1);
  const uint32_t cut = align > 0 ? AlignedCut(n, natural, align) : natural;
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0u);
  std::nth_element(order_.begin(), order_.begin() + cut, order_.end(), [&](uint32_t a, uint32_t b) {
    return projection_[a] != projection_[b] ? projection_[a] < projection_[b] : a < b;
  });
  spare_.assign(rows.begin(), rows.end());
  for (uint32_t i = 0; i < n; ++i) rows[i] = spare_[order_[i]];
  return cut;
}

}  // namespace icecache::packing
