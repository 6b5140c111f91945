#include "cacheserver/select/clustered_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/distance.h"
#include "kernels/nearest.h"

namespace icecache {
namespace {

// x becomes a unit vector; zero (and what overflows) becomes zero.
void Normalise(float* x, uint32_t dim) {
  float largest = 0;
  for (uint32_t j = 0; j < dim; ++j) largest = std::max(largest, std::abs(x[j]));
  if (!(largest > 0) || !std::isfinite(largest)) {
    std::fill(x, x + dim, 0.0f);
    return;
  }
  float square = 0;
  for (uint32_t j = 0; j < dim; ++j) square += (x[j] / largest) * (x[j] / largest);
  const float scale = 1.0f / std::sqrt(square);
  for (uint32_t j = 0; j < dim; ++j) x[j] = x[j] / largest * scale;
}

// Spherical k-means over unit rows x[count, dim]; appends unit centroids.
void TrainSegment(const float* x, uint32_t count, uint32_t dim, uint32_t clusters, uint32_t passes,
                  std::vector<float>* centroids) {
  std::vector<float> c(size_t{clusters} * dim), sums(c.size());
  for (uint32_t i = 0; i < clusters; ++i)
    std::copy_n(x + (uint64_t{i} * count / clusters) * dim, dim, c.data() + size_t{i} * dim);
  std::vector<uint32_t> nearest(count);
  CentroidPanels panels;
  for (uint32_t pass = 0; pass + 1 < passes; ++pass) {
    panels.Assign(c.data(), clusters, dim);
    Nearest(panels, {x, dim, nullptr}, count, nearest.data(), nullptr);
    std::fill(sums.begin(), sums.end(), 0.0f);
    AddRowsByIndex({x, dim, nullptr}, count, dim, nearest.data(), sums.data());
    for (uint32_t i = 0; i < clusters; ++i) {
      float* sum = sums.data() + size_t{i} * dim;
      Normalise(sum, dim);
      // An empty cluster keeps its centroid.
      if (std::any_of(sum, sum + dim, [](float e) { return e != 0; }))
        std::copy_n(sum, dim, c.data() + size_t{i} * dim);
    }
  }
  centroids->insert(centroids->end(), c.begin(), c.end());
}

}  // namespace

ClusteredTokens::ClusteredTokens(PolicyKind kind, const PolicyOptions& options,
                                 const ClusteringOptions& how)
    : ArrivalPolicy(kind, options, {.token = sizeof(uint32_t)}), how_(how) {}

uint32_t ClusteredTokens::cluster_count() const {
  const size_t dim = options().head_dim;
  if (shared().size() < dim) return 0;
  return static_cast<uint32_t>((shared().size() - dim) / (dim + 1 + (how_.values ? dim : 0)));
}

void ClusteredTokens::Reset(uint32_t clusters) {
  const size_t dim = options().head_dim;
  shared().resize(dim);
  shared().resize(dim + clusters * (dim + 1 + (how_.values ? dim : 0)), 0.0f);
}

// Running means.
void ClusteredTokens::Join(uint32_t cluster, const float* key, const float* value_row) {
  const uint32_t dim = options().head_dim;
  float& size = const_cast<float*>(sizes())[cluster];
  const float keep = size / (size + 1), add = 1 / (size + 1);
  float* centroid = mutable_centroid(cluster);
  for (uint32_t j = 0; j < dim; ++j) centroid[j] = keep * centroid[j] + add * key[j];
  if (how_.values) {
    float* mean = const_cast<float*>(value(cluster));
    for (uint32_t j = 0; j < dim; ++j) mean[j] = keep * mean[j] + add * value_row[j];
  }
  ++size;
}

uint32_t ClusteredTokens::NearestCluster(const float* key) const {
  const uint32_t dim = options().head_dim;
  const float* mean = shared().data();
  uint32_t best = 0;
  double best_cosine = -2;
  for (uint32_t c = 0; c < cluster_count(); ++c) {
    const float* centroid = centroids() + size_t{c} * dim;
    double dot = 0, square = 0;
    for (uint32_t j = 0; j < dim; ++j) {
      const double x = double{centroid[j]} - mean[j];
      dot += x * (double{key[j]} - mean[j]);
      square += x * x;
    }
    if (square > 0) dot /= std::sqrt(square);  // the key's own norm is common to all
    if (c > 0 && !(dot > best_cosine)) continue;
    best = c;
    best_cosine = dot;
  }
  return best;
}

void ClusteredTokens::Learn(const TokenRows& rows, const BuildHints&) {
  const uint32_t dim = rows.head_dim, count = rows.count;
  std::vector<float> x(size_t{count} * dim), unit_centroids;
  ToF32(rows.k, rows.dtype, x.size(), x.data());
  shared().assign(dim, 0.0f);
  if (how_.centred) {
    for (uint32_t j = 0; j < dim; ++j) {
      double sum = 0;
      for (uint32_t t = 0; t < count; ++t) sum += x[size_t{t} * dim + j];
      shared()[j] = static_cast<float>(sum / count);
    }
  }
  for (uint32_t t = 0; t < count; ++t) {
    float* row = x.data() + size_t{t} * dim;
    for (uint32_t j = 0; j < dim; ++j) row[j] -= shared()[j];
    Normalise(row, dim);
  }
  const uint32_t step = how_.segment_tokens == 0 ? count : how_.segment_tokens;
  for (uint32_t first = 0; first < count; first += step) {
    const uint32_t n = std::min(step, count - first);
    TrainSegment(x.data() + size_t{first} * dim, n, dim, std::max(1u, n / how_.tokens_per_cluster),
                 how_.passes, &unit_centroids);
  }
  CentroidPanels panels;
  panels.Assign(unit_centroids.data(), static_cast<uint32_t>(unit_centroids.size() / dim), dim);
  assigned_.resize(count);
  Nearest(panels, {x.data(), dim, nullptr}, count, assigned_.data(), nullptr);
  // Clusters without tokens are not kept.
  std::vector<uint32_t> name(unit_centroids.size() / dim, 0);
  for (const uint32_t c : assigned_) name[c] = 1;
  uint32_t kept = 0;
  for (uint32_t& n : name) n = n != 0 ? kept++ : 0;
  Reset(kept);
  std::vector<float> key(dim), value_row(dim);
  for (uint32_t t = 0; t < count; ++t) {
    assigned_[t] = name[assigned_[t]];
    ToF32(rows.k + t * rows.row_bytes(), rows.dtype, dim, key.data());
    ToF32(rows.v + t * rows.row_bytes(), rows.dtype, dim, value_row.data());
    Join(assigned_[t], key.data(), value_row.data());
  }
}

void ClusteredTokens::Encode(const TokenRows& rows, const BuildHints&, uint8_t* cells) {
  const uint32_t dim = rows.head_dim;
  if (assigned_.empty()) {  // one new token
    std::vector<float> key(dim), value_row(dim);
    ToF32(rows.k, rows.dtype, dim, key.data());
    ToF32(rows.v, rows.dtype, dim, value_row.data());
    if (cluster_count() == 0) Reset(1);
    assigned_.push_back(NearestCluster(key.data()));
    Join(assigned_[0], key.data(), value_row.data());
  }
  std::memcpy(cells, assigned_.data(), assigned_.size() * sizeof(uint32_t));
  assigned_.clear();
}

void ClusteredTokens::Kept(const PagedKv& kept) {
  const uint32_t dim = options().head_dim;
  Reset(0);
  uint32_t clusters = 0;
  for (uint32_t p = 0; p < page_count(); ++p)
    for (uint32_t r = 0; r < fill(p); ++r)
      clusters = std::max(clusters, cluster_of()[p * limits::kPageTokens + r] + 1);
  Reset(clusters);
  std::vector<float> key(dim), value_row(dim);
  for (uint32_t p = 0; p < page_count(); ++p) {
    for (uint32_t r = 0; r < fill(p); ++r) {
      const size_t at = r * kept.row_bytes();
      ToF32(kept.pages[p].k + at, kept.dtype, dim, key.data());
      ToF32(kept.pages[p].v + at, kept.dtype, dim, value_row.data());
      Join(cluster_of()[p * limits::kPageTokens + r], key.data(), value_row.data());
    }
  }
}

std::string ClusteredTokens::Wrong() const {
  const size_t dim = options().head_dim;
  const uint32_t clusters = cluster_count();
  if (tokens() > 0 && clusters == 0) return "there are tokens and no clusters";
  if (!shared().empty() && shared().size() != dim + clusters * (dim + 1 + (how_.values ? dim : 0)))
    return "clusters have another size";
  std::vector<uint32_t> sizes_found(clusters, 0);
  for (uint32_t p = 0; p < page_count(); ++p) {
    for (uint32_t r = 0; r < fill(p); ++r) {
      const uint32_t cluster = cluster_of()[p * limits::kPageTokens + r];
      if (cluster >= clusters) return "a token belongs to no cluster";
      ++sizes_found[cluster];
    }
  }
  for (uint32_t c = 0; c < clusters; ++c)
    if (sizes()[c] != static_cast<float>(sizes_found[c])) return "a cluster's size is wrong";
  return {};
}

void ClusteredTokens::ScoreClusters(const SelectRequest& request, bool by_size,
                                    std::vector<float>* logits) const {
  const uint32_t clusters = cluster_count();
  logits->resize(size_t{request.group} * clusters);
  DotRows(request.queries, request.group, reinterpret_cast<const std::byte*>(centroids()),
          DType::kF32, clusters, options().head_dim, logits->data(), clusters);
  for (size_t i = 0; i < logits->size(); ++i) {
    const float size = sizes()[i % clusters];
    float& x = (*logits)[i];
    x = size > 0 ? SaturatedLogit(x) + (by_size ? std::log(size) : 0.0f) : kEmptyMax;
  }
}

void ClusteredTokens::WeighTokens(const SelectRequest& request, std::vector<float>* weight) const {
  thread_local std::vector<float> logits, mass;
  ScoreClusters(request, true, &logits);
  RankUnits(request, GroupRank::kMassSum, logits, &mass);
  weight->assign(slots(), 0.0f);
  for (uint32_t p = 0; p < page_count(); ++p) {
    for (uint32_t r = 0; r < fill(p); ++r) {
      const uint32_t slot = p * limits::kPageTokens + r;
      (*weight)[slot] = mass[cluster_of()[slot]] / sizes()[cluster_of()[slot]];
    }
  }
}

}  // namespace icecache
