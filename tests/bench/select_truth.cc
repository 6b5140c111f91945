#include "tests/bench/select_truth.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/distance.h"

namespace icecache {

void SelectTruth::Assign(uint32_t query, const PageStore& store) {
  const uint32_t dim = trace_.dim, group = trace_.group;
  store_ = &store;
  query_ = query;
  page_of_ = store.PageOf();
  stride_ = page_of_.size();
  const auto tokens = static_cast<uint32_t>(stride_);
  if (values_.size() != stride_ * dim) {
    values_.resize(stride_ * dim);
    ToF32(trace_.v.data(), trace_.dtype, values_.size(), values_.data());
  }
  weights_.resize(group * stride_);
  max_.resize(group);
  total_.resize(group);
  full_.assign(size_t{group} * dim, 0.0);
  DotRows(trace_.Query(query), group, trace_.k.data(), trace_.dtype, tokens, dim, weights_.data(),
          stride_);
  std::vector<float> sum(size_t{group} * dim, 0.0f);
  for (uint32_t h = 0; h < group; ++h) {
    float* w = weights_.data() + size_t{h} * stride_;
    max_[h] = MaxOf(w, stride_);
    ExpShifted(w, stride_, max_[h], w);
    total_[h] = std::accumulate(w, w + stride_, 0.0);
  }
  AddWeightedRows(weights_.data(), stride_, group,
                  reinterpret_cast<const std::byte*>(values_.data()), DType::kF32, tokens, dim,
                  sum.data());
  for (uint32_t h = 0; h < group; ++h) {
    std::vector<double> out(sum.begin() + size_t{h} * dim, sum.begin() + size_t{h + 1} * dim);
    double denom = total_[h];
    if (!trace_.local_lse.empty()) {
      const size_t at = size_t{query} * group + h;
      const double local = std::exp(double{trace_.local_lse[at]} - max_[h]);
      denom += local;
      for (uint32_t j = 0; j < dim; ++j) out[j] += local * trace_.local_out[at * dim + j];
    }
    for (uint32_t j = 0; j < dim; ++j) full_[size_t{h} * dim + j] = out[j] / denom;
  }
}

const uint32_t* SelectTruth::TopTokens(uint32_t h, uint32_t count) {
  const float* w = Weights(h);
  order_.resize(stride_);
  std::iota(order_.begin(), order_.end(), 0u);
  if (count < order_.size())
    std::nth_element(order_.begin(), order_.begin() + count, order_.end(),
                     [w](uint32_t a, uint32_t b) { return w[a] != w[b] ? w[a] > w[b] : a < b; });
  return order_.data();
}

double SelectTruth::Coverage(uint32_t h, uint32_t count, std::span<const SelectedPage> pages) {
  count = static_cast<uint32_t>(std::min<size_t>(count, stride_));
  const uint32_t* top = TopTokens(h, count);
  std::vector<bool> chosen(store_->page_count());
  for (const SelectedPage& page : pages) chosen[page.page.value] = true;
  uint32_t found = 0;
  for (uint32_t i = 0; i < count; ++i) found += chosen[page_of_[top[i]]];
  return count == 0 ? 1.0 : static_cast<double>(found) / count;
}

double SelectTruth::Mass(uint32_t h, std::span<const SelectedPage> pages) const {
  double sum = 0;
  for (const SelectedPage& page : pages)
    for (const uint32_t t : store_->tokens(page.page.value)) sum += Weights(h)[t];
  return sum / total_[h];
}

double SelectTruth::ShareOf(uint32_t h, const AttentionStates& state) const {
  const float max = state.flat()[h], denom = state.flat()[state.heads() + h];
  return denom > 0 ? std::exp(double{max} - max_[h]) * denom / total_[h] : 0.0;
}

void SelectTruth::AddRow(uint32_t h, uint32_t token, double* denom,
                         std::vector<double>* sum) const {
  const double w = Weights(h)[token];
  const float* v = values_.data() + size_t{token} * trace_.dim;
  *denom += w;
  for (uint32_t j = 0; j < trace_.dim; ++j) (*sum)[j] += w * v[j];
}

void SelectTruth::AddPage(uint32_t h, uint32_t page, double* denom,
                          std::vector<double>* sum) const {
  for (const uint32_t t : store_->tokens(page)) AddRow(h, t, denom, sum);
}

// Adds the worker's part and compares with full attention.
double SelectTruth::ErrorOf(uint32_t h, double denom, std::vector<double>* sum) const {
  const uint32_t dim = trace_.dim;
  if (!trace_.local_lse.empty()) {
    const size_t at = size_t{query_} * trace_.group + h;
    const double local = std::exp(double{trace_.local_lse[at]} - max_[h]);
    denom += local;
    for (uint32_t j = 0; j < dim; ++j) (*sum)[j] += local * trace_.local_out[at * dim + j];
  }
  double difference = 0, norm = 0;
  for (uint32_t j = 0; j < dim; ++j) {
    const double full = full_[size_t{h} * dim + j];
    const double got = denom > 0 ? (*sum)[j] / denom : 0.0;
    difference += (got - full) * (got - full);
    norm += full * full;
  }
  return std::sqrt(difference / norm);
}

double SelectTruth::OutputError(uint32_t h, std::span<const SelectedPage> pages,
                                const AttentionStates* residual) const {
  const uint32_t dim = trace_.dim;
  double denom = 0;
  std::vector<double> sum(dim, 0.0);
  for (const SelectedPage& page : pages) AddPage(h, page.page.value, &denom, &sum);
  if (residual != nullptr) {
    const std::span<const float> flat = residual->flat();
    const uint32_t heads = residual->heads();
    if (flat[heads + h] > 0) {
      const double scale = std::exp(double{flat[h]} - max_[h]);
      denom += scale * flat[heads + h];
      for (uint32_t j = 0; j < dim; ++j) sum[j] += scale * flat[2 * heads + size_t{h} * dim + j];
    }
  }
  return ErrorOf(h, denom, &sum);
}

double SelectTruth::OracleError(uint32_t h, uint32_t tokens) {
  tokens = static_cast<uint32_t>(std::min<size_t>(tokens, stride_));
  const uint32_t* top = TopTokens(h, tokens);
  double denom = 0;
  std::vector<double> sum(trace_.dim, 0.0);
  for (uint32_t i = 0; i < tokens; ++i) AddRow(h, top[i], &denom, &sum);
  return ErrorOf(h, denom, &sum);
}

std::vector<SelectedPage> SelectTruth::OraclePages(uint32_t pages) const {
  std::vector<std::pair<double, uint32_t>> ranked;
  for (uint32_t p = 0; p < store_->page_count(); ++p) {
    double mass = 0;
    for (uint32_t h = 0; h < trace_.group; ++h)
      for (const uint32_t t : store_->tokens(p)) mass += Weights(h)[t] / total_[h];
    ranked.emplace_back(-mass, p);
  }
  const size_t count = std::min<size_t>(pages, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<ptrdiff_t>(count), ranked.end());
  std::vector<SelectedPage> best;
  for (size_t i = 0; i < count; ++i) best.push_back({PageId(ranked[i].second), 0.0f});
  return best;
}

std::vector<PageId> SelectTruth::NearPages(uint32_t tokens) const {
  std::vector<std::pair<double, uint32_t>> ranked;
  for (uint32_t t = 0; t < stride_; ++t) {
    double mass = 0;
    for (uint32_t h = 0; h < trace_.group; ++h) mass += Weights(h)[t] / total_[h];
    ranked.emplace_back(-mass, t);
  }
  const size_t count = std::min<size_t>(tokens, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<ptrdiff_t>(count), ranked.end());
  std::vector<PageId> near;
  for (size_t i = 0; i < count; ++i) {
    if (i % 5 != 4) near.emplace_back(page_of_[ranked[i].second]);
  }
  std::sort(near.begin(), near.end());
  near.erase(std::unique(near.begin(), near.end()), near.end());
  return near;
}

}  // namespace icecache
