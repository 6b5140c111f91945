// What is learnt about a slice before and from its layout.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/distance.h"
#include "kernels/memory.h"
#include "kernels/packing.h"

namespace icecache::packing {

namespace {

constexpr uint32_t kBasisSample = 2048;  // rows that mean, scale and metric are learnt from
constexpr uint32_t kPageSample = 192;    // pages that purity is measured on
constexpr float kSketchShare = 0.45f;  // of the variance inside pages that a sketch must see to pay

// Rows first, first + step, ... as f32.
void SampleRows(const TokenRows& rows, uint32_t sample, ScratchVector<float>* k,
                ScratchVector<float>* v) {
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

// Pages of the layout, evenly spaced: take_row of each of their rows of `data`, keys or values, in
// f32, which it may change; then take_page of the deviation, the sum of squares about the page's
// mean by dimension. The number of rows.
template <typename TakeRow, typename TakePage>
uint64_t VisitSampledPages(const TokenRows& rows, const std::byte* data, const Packing& packing,
                           const TakeRow& take_row, const TakePage& take_page) {
  const uint32_t dim = rows.head_dim, page_count = packing.layout.page_count();
  const uint32_t sample = std::min(page_count, kPageSample);
  std::vector<float> x(size_t{kPageRows} * dim), mean(dim), deviation(dim);
  uint64_t tokens = 0;
  for (uint32_t i = 0; i < sample; ++i) {
    const auto page = static_cast<uint32_t>(uint64_t{i} * page_count / sample);
    const uint32_t begin = packing.layout.page_begin[page];
    const uint32_t count = packing.layout.page_begin[page + 1] - begin;
    for (uint32_t r = 0; r < count; ++r) {
      float* row = x.data() + size_t{r} * dim;
      ToF32(data + packing.layout.tokens[begin + r] * rows.row_bytes(), rows.dtype, dim, row);
      take_row(row);
    }
    Moments(x.data(), count, dim, mean.data(), deviation.data());
    take_page(deviation);
    tokens += count;
  }
  return tokens;
}

}  // namespace

void ToCoordinates(const Basis& basis, const float* k, float* z) {
  const size_t dim = basis.mean.size();
  const float* mean = basis.mean.data();
  const float* inverse = basis.inverse.data();
  for (size_t j = 0; j < dim; ++j) {
    const float x = (k[j] - mean[j]) * inverse[j];
    z[j] = std::min(std::max(x, -kCoordinateMax), kCoordinateMax);
  }
}

void Moments(const float* rows, uint32_t count, uint32_t dim, float* mean, float* deviation) {
  constexpr uint32_t kBlock = 16;  // sums of as many dimensions stay in registers
  const float share = 1.0f / static_cast<float>(count);
  for (uint32_t j = 0; j < dim; j += kBlock) {
    float sum[kBlock] = {}, square[kBlock] = {};
    for (uint32_t r = 0; r < count; ++r) {
      for (uint32_t i = 0; i < kBlock; ++i) sum[i] += rows[size_t{r} * dim + j + i];
    }
    for (float& x : sum) x *= share;
    for (uint32_t i = 0; i < kBlock; ++i) mean[j + i] = sum[i];
    if (deviation == nullptr) continue;
    for (uint32_t r = 0; r < count; ++r) {
      for (uint32_t i = 0; i < kBlock; ++i) {
        const float x = rows[size_t{r} * dim + j + i] - sum[i];
        square[i] += x * x;
      }
    }
    for (uint32_t i = 0; i < kBlock; ++i) deviation[j + i] = square[i];
  }
}

Basis BasisOf(const TokenRows& rows, std::span<const float> query_energy) {
  Basis basis;
  basis.energy.assign(query_energy.begin(), query_energy.end());
  ScratchVector<float> k, v;
  const uint32_t sample = std::min(rows.count, kBasisSample);
  SampleRows(rows, sample, &k, &v);
  LearnBasis(k.data(), v.data(), sample, rows.head_dim, &basis);
  basis.tokens = rows.count;
  return basis;
}

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

void LearnPages(const TokenRows& rows, const Packing& packing, SketchUse sketch, Basis* basis) {
  const uint32_t dim = rows.head_dim;
  std::vector<double> variance(dim, 0.0);
  const uint64_t tokens = VisitSampledPages(
      rows, rows.k, packing, [&](float* row) { ToCoordinates(*basis, row, row); },
      [&](const std::vector<float>& deviation) {
        for (uint32_t j = 0; j < dim; ++j) variance[j] += deviation[j];
      });
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
  const uint32_t dims = SketchDims(dim);
  for (uint32_t i = 0; i < dims; ++i) seen -= order[i].first;
  basis->sketch_dims.clear();
  const bool pays = spread > 0 && seen >= kSketchShare * spread;
  if (sketch == SketchUse::kOff || (sketch == SketchUse::kAuto && !pays)) return;
  for (uint32_t i = 0; i < dims; ++i) basis->sketch_dims.push_back(order[i].second);
  std::sort(basis->sketch_dims.begin(), basis->sketch_dims.end());
}

// Share of the values' variance that is left inside pages, on a sample of them; at most 1.
double ValueSpread(const TokenRows& rows, const Packing& packing) {
  const uint32_t dim = rows.head_dim;
  std::vector<double> sum(dim, 0.0), square(dim, 0.0);
  double inside = 0;
  const auto tokens = static_cast<double>(VisitSampledPages(
      rows, rows.v, packing,
      [&](const float* row) {
        for (uint32_t j = 0; j < dim; ++j) {
          sum[j] += row[j];
          square[j] += double{row[j]} * row[j];
        }
      },
      [&](const std::vector<float>& deviation) {
        inside += std::accumulate(deviation.begin(), deviation.end(), 0.0);
      }));
  double total = 0;
  for (uint32_t j = 0; j < dim; ++j) total += square[j] - sum[j] * sum[j] / std::max(1.0, tokens);
  return total > 0 ? std::min(1.0, inside / total) : 0.0;
}

}  // namespace icecache::packing
