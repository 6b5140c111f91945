#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/status.h"
#include "kernels/attention.h"

namespace icecache {
namespace {

double ElementOf(const std::byte* rows, DType dtype, size_t index) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, rows + 4 * index, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, rows + 2 * index, 2);
  return dtype == DType::kF16 ? F16ToF32(bits) : BF16ToF32(bits);
}

// Softmax sums of one query head in float64, over all rows added so far.
class Accumulator {
 public:
  explicit Accumulator(uint32_t head_dim) : out_(head_dim, 0.0) {}

  void Add(const float* query, DType dtype, const std::byte* k, const std::byte* v) {
    const size_t dim = out_.size();
    double logit = 0;
    for (size_t j = 0; j < dim; ++j) logit += query[j] * ElementOf(k, dtype, j);
    // A state's maximum is a float: larger logits saturate, as in every implementation.
    constexpr double kLargest = std::numeric_limits<float>::max() / 4;
    logit = std::clamp(logit, -kLargest, kLargest);
    const double max = std::max(max_, logit);
    const double keep = denom_ > 0 ? std::exp(max_ - max) : 0.0;
    const double add = std::exp(logit - max);
    for (size_t j = 0; j < dim; ++j) out_[j] = keep * out_[j] + add * ElementOf(v, dtype, j);
    denom_ = keep * denom_ + add;
    max_ = max;
  }

  void MergeInto(const AttentionStateRef& state, uint32_t head) const {
    if (denom_ == 0) return;
    const double old_max = state.denom[head] > 0 ? static_cast<double>(state.max[head]) : max_;
    const double max = std::max(max_, old_max);
    const double keep = state.denom[head] > 0 ? std::exp(old_max - max) : 0.0;
    // The stored maximum is rounded to float; the sums are taken relative to what is stored.
    const auto stored = static_cast<float>(max);
    const double shift = std::exp(max - stored);
    const double add = std::exp(max_ - max);
    float* out = state.row(head);
    for (size_t j = 0; j < out_.size(); ++j)
      out[j] = static_cast<float>(shift * (keep * out[j] + add * out_[j]));
    state.denom[head] = static_cast<float>(shift * (keep * state.denom[head] + add * denom_));
    state.max[head] = stored;
  }

 private:
  double max_ = -std::numeric_limits<double>::infinity();
  double denom_ = 0;
  std::vector<double> out_;
};

class ReferenceAttention final : public AttentionBackend {
 public:
  const char* name() const override { return "reference"; }
  bool on_device() const override { return false; }

  Status Start(std::span<const AttentionItem> items) override {
    for (const AttentionItem& item : items) {
      if (item.rows.count > 0) AddRows(item.queries, item.rows, item.states);
      if (!item.pages.empty()) AddPages(item.queries, item.kv, item.pages, item.states);
    }
    return OkStatus();
  }
  Status Finish() override { return OkStatus(); }
  Status FinishTo(std::span<const AttentionResult> results) override {
    for (const AttentionResult& result : results) FinishStates(result.states, result.out);
    return OkStatus();
  }

 private:
  void AddRows(const float* queries, const TokenRows& rows, const AttentionStateRef& states) {
    KV_CHECK(states.head_dim == rows.head_dim);
    for (uint32_t h = 0; h < states.heads; ++h) {
      Accumulator sum(rows.head_dim);
      for (uint32_t r = 0; r < rows.count; ++r) {
        sum.Add(queries + size_t{h} * rows.head_dim, rows.dtype, rows.k + r * rows.row_bytes(),
                rows.v + r * rows.row_bytes());
      }
      sum.MergeInto(states, h);
    }
  }

  void AddPages(const float* queries, const PagedKv& kv, std::span<const PageId> pages,
                const AttentionStateRef& states) {
    KV_CHECK(states.head_dim == kv.head_dim);
    for (uint32_t h = 0; h < states.heads; ++h) {
      Accumulator sum(kv.head_dim);
      for (const PageId id : pages) {
        KV_CHECK(id.value < kv.page_count && kv.pages[id.value].k != nullptr);
        const PageView& page = kv.pages[id.value];
        for (uint32_t r = 0; r < page.fill; ++r) {
          sum.Add(queries + size_t{h} * kv.head_dim, kv.dtype, page.k + r * kv.row_bytes(),
                  page.v + r * kv.row_bytes());
        }
      }
      sum.MergeInto(states, h);
    }
  }
};

}  // namespace

std::unique_ptr<AttentionBackend> MakeReferenceAttention() {
  return std::make_unique<ReferenceAttention>();
}

}  // namespace icecache
