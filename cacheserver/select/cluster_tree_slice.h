// A policy with its pages and clustered rows to feed it: support of the ClusterTree tests.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "cacheserver/select/cluster_tree.h"
#include "kernels/attention.h"
#include "kernels/distance.h"
#include "tests/support/page_store.h"

namespace icecache {

using Layout = ClusterTreeOptions::Layout;
using Sketch = ClusterTreeOptions::Sketch;

// A policy with its pages, and clustered rows in f32 to feed it.
class Slice {
 public:
  explicit Slice(uint32_t dim, ClusterTreeOptions options = {}, DType dtype = DType::kF16,
                 uint64_t seed = 1)
      : dim_(dim),
        dtype_(dtype),
        options_(options),
        store_(dtype, dim),
        rng_(seed),
        centres_(24 * size_t{dim}) {
    for (float& x : centres_) x = normal_(rng_);
    policy_ = Make();
  }
  std::unique_ptr<SelectionPolicy> Make() const {
    return MakeClusterTree({dtype_, dim_, 3}, options_);
  }

  // Clustered rows; run: tokens in a row of one cluster; varying: dimensions in which rows of a
  // cluster differ.
  void Draw(uint32_t count, uint32_t run = 1, uint32_t varying = UINT32_MAX) {
    for (uint32_t t = 0; t < count; ++t) {
      if (drawn_++ % run == 0) cluster_ = rng_() % 24;
      Push([&](uint32_t j) {
        return centres_[cluster_ * dim_ + j] + (j < varying ? 0.6f * normal_(rng_) : 0);
      });
    }
  }
  // The same by the hundred thousand: noise is cut out of a pool at random places, which costs a
  // hundredth of drawing it.
  void DrawMany(uint32_t count) {
    constexpr uint32_t kPool = 1 << 16;
    std::vector<float> pool(kPool + 2 * dim_), row(2 * dim_);
    for (float& x : pool) x = normal_(rng_);
    const size_t bytes = size_t{dim_} * DTypeBytes(dtype_);
    size_t at = k_.size();
    k_.resize(at + count * bytes);
    v_.resize(at + count * bytes);
    for (uint32_t t = 0; t < count; ++t, at += bytes) {
      const float* centre = centres_.data() + rng_() % 24 * dim_;
      const float* noise = pool.data() + rng_() % kPool;
      for (uint32_t j = 0; j < dim_; ++j) row[j] = centre[j] + 0.6f * noise[j];
      for (uint32_t j = 0; j < dim_; ++j)
        row[dim_ + j] = 0.7f * row[(j + 7) % dim_] + 0.7f * noise[dim_ + j];
      FromF32(row.data(), dim_, dtype_, k_.data() + at);
      FromF32(row.data() + dim_, dim_, dtype_, v_.data() + at);
    }
  }
  template <typename F>
  void Push(F element) {
    std::vector<float> row(2 * dim_);
    for (uint32_t j = 0; j < dim_; ++j) row[j] = element(j);
    for (uint32_t j = 0; j < dim_; ++j)
      row[dim_ + j] = 0.7f * row[(j + 7) % dim_] + 0.7f * normal_(rng_);
    const size_t bytes = size_t{dim_} * DTypeBytes(dtype_);
    k_.resize(k_.size() + bytes);
    v_.resize(v_.size() + bytes);
    FromF32(row.data(), dim_, dtype_, k_.data() + k_.size() - bytes);
    FromF32(row.data() + dim_, dim_, dtype_, v_.data() + v_.size() - bytes);
  }
  uint32_t pending() const {
    return static_cast<uint32_t>(k_.size() / (dim_ * DTypeBytes(dtype_)));
  }
  TokenRows rows() const { return {dtype_, dim_, pending(), k_.data(), v_.data()}; }
  void Forget() { k_.clear(), v_.clear(); }

  Status Build(const BuildHints& hints = {}) {
    auto layout = policy_->Build(rows(), hints);
    if (!layout.ok()) return layout.status();
    KV_RETURN_IF_ERROR(store_.ApplyLayout(rows(), *layout));
    Forget();
    return OkStatus();
  }
  Status InsertAll() {
    const TokenRows all = rows();
    for (uint32_t t = 0; t < all.count; ++t) {
      const TokenRows row{dtype_, dim_, 1, all.k + t * all.row_bytes(),
                          all.v + t * all.row_bytes()};
      auto plan = policy_->Insert(row, store_.kv());
      if (!plan.ok()) return plan.status();
      KV_RETURN_IF_ERROR(store_.ApplyInsert(*plan, row));
    }
    Forget();
    return OkStatus();
  }
  std::vector<float> Queries(uint32_t group, float sharpness = 1) {
    std::vector<float> q(size_t{group} * dim_);
    const size_t c = rng_() % 24;
    for (size_t i = 0; i < q.size(); ++i) {
      q[i] = sharpness * (centres_[c * dim_ + i % dim_] + 0.6f * normal_(rng_)) /
             std::sqrt(static_cast<float>(dim_));
    }
    return q;
  }
  Status Validate() const { return policy_->Validate(store_.kv()); }
  double Counter(std::string_view name) const {
    double value = std::nan("");
    policy_->VisitCounters([&](std::string_view n, double x) { value = n == name ? x : value; });
    return value;
  }

  SelectionPolicy& policy() { return *policy_; }
  PageStore& store() { return store_; }
  std::mt19937_64& rng() { return rng_; }
  const uint32_t dim_;

 private:
  const DType dtype_;
  const ClusterTreeOptions options_;
  std::unique_ptr<SelectionPolicy> policy_;
  PageStore store_;
  std::mt19937_64 rng_;
  std::normal_distribution<float> normal_;
  std::vector<float> centres_;
  std::vector<std::byte> k_, v_;
  size_t cluster_ = 0;
  uint64_t drawn_ = 0;
};

inline Selection Ask(const SelectionPolicy& policy, const PagedKv& kv,
                     const std::vector<float>& queries, uint32_t max_pages, uint32_t read_cap) {
  SelectRequest request;
  request.queries = queries.data();
  request.group = static_cast<uint32_t>(queries.size() / kv.head_dim);
  request.max_pages = max_pages;
  request.read_cap = read_cap;
  Selection out;
  policy.Select(request, kv, &out);
  return out;
}

inline uint32_t RowsOf(const Selection& selection, const PagedKv& kv) {
  uint32_t rows = 0;
  for (const SelectedPage& page : selection.pages) rows += kv.pages[page.page.value].fill;
  return rows;
}

// Relative error of pages + residual against full attention, and of the log of the whole mass.
struct Error {
  double output, log_mass;
};
inline Error ErrorOf(
    const PagedKv& kv, const std::vector<float>& queries, Selection selection,
    const std::unique_ptr<AttentionBackend>& reference = MakeReferenceAttention()) {
  const auto group = static_cast<uint32_t>(queries.size() / kv.head_dim);
  std::vector<PageId> all, chosen;
  for (uint32_t p = 0; p < kv.page_count; ++p) all.emplace_back(p);
  for (const SelectedPage& page : selection.pages) chosen.push_back(page.page);
  AttentionStates full(group, kv.head_dim);
  reference->AttendPages(queries.data(), kv, all, full.ref());
  reference->AttendPages(queries.data(), kv, chosen, selection.residual.ref());
  Error error{0, 0};
  for (uint32_t g = 0; g < group; ++g) {
    error.log_mass +=
        std::fabs(LogSumExp(full.ref(), g) - LogSumExp(selection.residual.ref(), g)) / group;
  }
  std::vector<float> x(queries.size()), y(queries.size());
  FinishStates(full.ref(), x.data());
  FinishStates(selection.residual.ref(), y.data());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (double{x[i]} - y[i]) * (double{x[i]} - y[i]);
    norm += double{x[i]} * x[i];
  }
  error.output = std::sqrt(difference / norm);
  return error;
}

}  // namespace icecache
