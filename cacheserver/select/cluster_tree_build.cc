// Build: statistics of the slice, choice of layout, summaries.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {

constexpr uint32_t kBasisSample = 2048;  // rows that mean, scale and metric are learnt from
constexpr uint32_t kPageSample = 192;    // pages that purity is measured on
constexpr float kSketchShare = 0.45f;  // of the variance inside pages that a sketch must see to pay
constexpr float kSequentialTolerance =
    1.05f;                           // sequential pages win when at most this much less pure
constexpr float kValueShare = 0.3f;  // of the key variance, where values take part

// Rows first, first + step, ... as f32.
void SampleRows(const TokenRows& rows, uint32_t sample, std::vector<float>* k,
                std::vector<float>* v) {
  k->resize(size_t{sample} * rows.head_dim);
  v->resize(size_t{sample} * rows.head_dim);
  for (uint32_t i = 0; i < sample; ++i) {
    const size_t row = size_t{i} * rows.count / sample;
    ToF32(rows.k + row * rows.row_bytes(), rows.dtype, rows.head_dim,
          k->data() + size_t{i} * rows.head_dim);
    ToF32(rows.v + row * rows.row_bytes(), rows.dtype, rows.head_dim,
          v->data() + size_t{i} * rows.head_dim);
  }
}

void LoadPage(const TokenRows& rows, const PageLayout& layout, uint32_t page, const Basis& basis,
              PageRows* out) {
  out->count = 0;
  // A page's rows come from anywhere in the slice: fetch the next page's while these are worked on.
  const uint32_t end = layout.page_begin[page + 1];
  const auto ahead = std::min<size_t>(layout.tokens.size(), end + kPageRows);
  for (size_t i = end; i < ahead; ++i) {
    const size_t at = layout.tokens[i] * rows.row_bytes();
    for (size_t line = 0; line < rows.row_bytes(); line += 64) {
      __builtin_prefetch(rows.k + at + line);
      __builtin_prefetch(rows.v + at + line);
    }
  }
  for (uint32_t i = layout.page_begin[page]; i < end; ++i) {
    const size_t at = layout.tokens[i] * rows.row_bytes();
    out->Add(basis, rows.dtype, rows.k + at, rows.v + at);
  }
}

// Share of the values' variance that is left inside pages, on a sample of them; at most 1.
double ValueSpread(const TokenRows& rows, const Packing& packing) {
  const uint32_t dim = rows.head_dim, page_count = packing.layout.page_count();
  const uint32_t sample = std::min(page_count, kPageSample);
  std::vector<float> v(size_t{kPageRows} * dim), mean(dim), deviation(dim);
  std::vector<double> sum(dim, 0.0), square(dim, 0.0);
  double inside = 0, tokens = 0;
  for (uint32_t i = 0; i < sample; ++i) {
    const auto page = static_cast<uint32_t>(uint64_t{i} * page_count / sample);
    const uint32_t begin = packing.layout.page_begin[page];
    const uint32_t count = packing.layout.page_begin[page + 1] - begin;
    for (uint32_t r = 0; r < count; ++r) {
      float* row = v.data() + size_t{r} * dim;
      ToF32(rows.v + packing.layout.tokens[begin + r] * rows.row_bytes(), rows.dtype, dim, row);
      for (uint32_t j = 0; j < dim; ++j) {
        sum[j] += row[j];
        square[j] += double{row[j]} * row[j];
      }
    }
    Moments(v.data(), count, dim, mean.data(), deviation.data());
    inside += std::accumulate(deviation.begin(), deviation.end(), 0.0);
    tokens += count;
  }
  double total = 0;
  for (uint32_t j = 0; j < dim; ++j) total += square[j] - sum[j] * sum[j] / std::max(1.0, tokens);
  return total > 0 ? std::min(1.0, inside / total) : 0.0;
}

Status CheckRows(const TokenRows& rows, const BuildHints& hints, uint32_t head_dim) {
  if (rows.head_dim != head_dim) {
    return InvalidArgument("cluster_tree: rows of head_dim " + std::to_string(rows.head_dim) +
                           ", expected " + std::to_string(head_dim));
  }
  if (!hints.query_energy.empty() && hints.query_energy.size() != head_dim) {
    return InvalidArgument("cluster_tree: query_energy has " +
                           std::to_string(hints.query_energy.size()) +
                           " values, expected none or head_dim = " + std::to_string(head_dim));
  }
  const size_t count = size_t{rows.count} * head_dim;
  if (!AllFinite(rows.k, rows.dtype, count))
    return InvalidArgument("cluster_tree: a key is NaN or infinite");
  if (!AllFinite(rows.v, rows.dtype, count))
    return InvalidArgument("cluster_tree: a value is NaN or infinite");
  for (float e : hints.query_energy) {
    if (!std::isfinite(e) || e < 0)
      return InvalidArgument("cluster_tree: query_energy must be finite and >= 0");
  }
  return OkStatus();
}

void FillTree(const TokenRows& rows, const Packing& packing, Tree* tree) {
  AddPages(*tree, packing.layout.page_count());
  PageRows page_rows(tree->head_dim);
  for (size_t s = 0; s + 1 < packing.super_begin.size(); ++s) {
    const uint32_t super = AddSuper(*tree);
    for (uint32_t page = packing.super_begin[s]; page < packing.super_begin[s + 1]; ++page) {
      LoadPage(rows, packing.layout, page, tree->basis, &page_rows);
      TakeSlot(*tree, super, page);
      WritePage(*tree, page, page_rows);
    }
    WriteSuper(*tree, super);
  }
  tree->tokens = rows.count;
}

}  // namespace

void LearnBasis(const float* k, const float* v, uint32_t count, uint32_t dim, Basis* basis) {
  const double share = 1.0 / std::max(1u, count);
  std::vector<double> mean(dim, 0.0), value(dim, 0.0), variance(dim, 0.0);
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t j = 0; j < dim; ++j) mean[j] += k[size_t{i} * dim + j] * share;
    for (uint32_t j = 0; j < dim; ++j) value[j] += v[size_t{i} * dim + j] * share;
  }
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t j = 0; j < dim; ++j) {
      const double x = k[size_t{i} * dim + j] - mean[j];
      variance[j] += x * x * share;
    }
  }
  const double rms = std::sqrt(std::accumulate(variance.begin(), variance.end(), 0.0) / dim);
  const double energy_mean = std::accumulate(basis->energy.begin(), basis->energy.end(), 0.0) /
                             std::max<size_t>(1, basis->energy.size());
  basis->tokens = count;
  basis->mean.assign(mean.begin(), mean.end());
  basis->value_mean.assign(value.begin(), value.end());
  basis->scale.resize(dim);
  basis->inverse.resize(dim);
  basis->weight.resize(dim);
  std::vector<double> weight(dim);
  for (uint32_t j = 0; j < dim; ++j) {
    // A dimension that hardly varied in the sample may yet do so: a hundredth of the others' scale
    // at least.
    const double scale = rms > 1e-30 ? std::max(std::sqrt(variance[j]), 0.01 * rms) : 1.0;
    const double energy =
        energy_mean > 0 ? std::max<double>(basis->energy[j], 1e-3 * energy_mean) : 1.0;
    basis->scale[j] = static_cast<float>(scale);
    basis->inverse[j] = 1.0f / basis->scale[j];
    weight[j] = energy * scale * scale;
  }
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (uint32_t j = 0; j < dim; ++j) basis->weight[j] = static_cast<float>(weight[j] * dim / total);
  basis->page_variance.assign(dim, 0.0f);
  basis->page_spread = 0;
  basis->sketch_dims.clear();
}

void LearnPages(const TokenRows& rows, const Packing& packing, ClusterTreeOptions::Sketch sketch,
                Basis* basis) {
  const uint32_t dim = rows.head_dim;
  const uint32_t page_count = packing.layout.page_count();
  const uint32_t sample = std::min(page_count, kPageSample);
  std::vector<double> variance(dim, 0.0);
  std::vector<float> z(size_t{kPageRows} * dim), mean(dim), deviation(dim);
  uint64_t tokens = 0;
  for (uint32_t i = 0; i < sample; ++i) {
    const auto page = static_cast<uint32_t>(uint64_t{i} * page_count / sample);
    const uint32_t begin = packing.layout.page_begin[page];
    const uint32_t count = packing.layout.page_begin[page + 1] - begin;
    for (uint32_t r = 0; r < count; ++r) {
      float* row = z.data() + size_t{r} * dim;
      ToF32(rows.k + packing.layout.tokens[begin + r] * rows.row_bytes(), rows.dtype, dim, row);
      ToCoordinates(*basis, row, row);
    }
    Moments(z.data(), count, dim, mean.data(), deviation.data());
    for (uint32_t j = 0; j < dim; ++j) variance[j] += deviation[j];
    tokens += count;
  }
  double spread = 0;
  std::vector<std::pair<double, uint32_t>> order(dim);  // most variance first
  for (uint32_t j = 0; j < dim; ++j) {
    const double v = tokens > 0 ? variance[j] / static_cast<double>(tokens) : 0.0;
    basis->page_variance[j] = static_cast<float>(v);
    spread += basis->weight[j] * v;
    order[j] = {-basis->weight[j] * v, j};
  }
  basis->page_spread = static_cast<float>(spread);
  std::sort(order.begin(), order.end());
  double seen = 0;
  for (uint32_t i = 0; i < kSketchDims; ++i) seen -= order[i].first;
  basis->sketch_dims.clear();
  const bool pays = spread > 0 && seen >= kSketchShare * spread;
  if (sketch == ClusterTreeOptions::Sketch::kOff ||
      (sketch == ClusterTreeOptions::Sketch::kAuto && !pays))
    return;
  for (uint32_t i = 0; i < kSketchDims; ++i) basis->sketch_dims.push_back(order[i].second);
  std::sort(basis->sketch_dims.begin(), basis->sketch_dims.end());
}

Packing PackSequential(uint32_t count) {
  Packing packing;
  packing.layout.tokens.resize(count);
  std::iota(packing.layout.tokens.begin(), packing.layout.tokens.end(), 0u);
  const uint32_t pages = (count + kPageRows - 1) / kPageRows;
  for (uint32_t p = 0; p < pages; ++p) packing.layout.page_begin.push_back(p * kPageRows);
  packing.layout.page_begin.push_back(count);
  for (uint32_t p = 0; p < pages; p += kSuperPages) packing.super_begin.push_back(p);
  packing.super_begin.push_back(pages);
  return packing;
}

Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints,
                         const ClusterTreeOptions& options, uint64_t seed, Tree* tree) {
  using Layout = ClusterTreeOptions::Layout;
  KV_CHECK(tree->tokens == 0);
  KV_RETURN_IF_ERROR(CheckRows(rows, hints, tree->head_dim));
  Basis basis;
  basis.energy.assign(hints.query_energy.begin(), hints.query_energy.end());
  std::vector<float> k, v;
  const uint32_t sample = std::min(rows.count, kBasisSample);
  SampleRows(rows, sample, &k, &v);
  LearnBasis(k.data(), v.data(), sample, tree->head_dim, &basis);
  basis.tokens = rows.count;

  // Not their exclusive or: a slice gives both the same seed, and all slices would share one sequence.
  const uint64_t build_seed = seed + 0x9e3779b97f4a7c15ull * hints.seed;
  Packing packing = PackSequential(rows.count);
  if (options.layout == Layout::kRandom) {
    std::mt19937_64 rng(build_seed);
    std::shuffle(packing.layout.tokens.begin(), packing.layout.tokens.end(), rng);
  }
  LearnPages(rows, packing, options.sketch, &basis);
  const bool in_place = options.layout == Layout::kSequential || options.layout == Layout::kRandom;
  if (!in_place && rows.count > kPageRows) {
    Basis other = basis;
    // Where tokens are sketched, keys may differ inside a page: each one's is known well enough.
    // What is then known least of a page that nobody reads are its values.
    const bool by_value = options.layout == Layout::kContentValue ||
                          (options.layout == Layout::kAuto && basis.sketched());
    const float value_share = by_value ? kValueShare : 0.0f;
    Packing content = PackContent(rows, basis, value_share, build_seed);
    LearnPages(rows, content, options.sketch, &other);
    // Both by what the packing aims at; the metric's variance is 1 per dimension. Where values are
    // not looked at, neighbours get a bonus for having values alike.
    const float tolerance = by_value ? 1.0f : kSequentialTolerance;
    const auto impurity = [&](const Basis& of, const Packing& pages) {
      return of.page_spread +
             (by_value ? kValueShare * tree->head_dim * ValueSpread(rows, pages) : 0.0);
    };
    if (options.layout != Layout::kAuto ||
        impurity(other, content) * tolerance < impurity(basis, packing)) {
      packing = std::move(content);
      basis = std::move(other);
    }
  }
  tree->basis = std::move(basis);
  FillTree(rows, packing, tree);
  return std::move(packing.layout);
}

}  // namespace icecache::cluster_tree
