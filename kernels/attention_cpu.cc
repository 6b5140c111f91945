#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/limits.h"
#include "common/status.h"
#include "kernels/attention.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

// Rows scored before the running sums are touched: one rescale per 64 rows is noise, and 16
// queries' scores are 4 KiB.
constexpr uint32_t kBlockRows = 64;
constexpr uint32_t kPagesPerBlock = kBlockRows / limits::kPageTokens;

// Consecutive rows of one block: a whole TokenRows block or one page of it.
struct Run {
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  uint32_t count = 0;
};

// Sums can overflow only with values near the largest float. Such logits saturate: the result stays
// finite and the largest still wins.
void Saturate(float* x, uint32_t count) {
  constexpr float kLargest = std::numeric_limits<float>::max() / 4;
  for (uint32_t i = 0; i < count; ++i) {
    if (!(x[i] > -kLargest)) x[i] = -kLargest;  // also NaN, from inf - inf
    if (x[i] > kLargest) x[i] = kLargest;
  }
}

// scores[group][kBlockRows] become weights relative to the states' new maxima.
void ScoresToWeights(float* scores, uint32_t count, const AttentionStateRef& states) {
  for (uint32_t h = 0; h < states.heads; ++h) {
    float* row = scores + size_t{h} * kBlockRows;
    const float old = states.denom[h] > 0 ? states.max[h] : kEmptyMax;
    float max = std::max(old, MaxOf(row, count));
    // Restart from saturated logits when any is infinite or NaN; no cost in the common case.
    bool finite = std::isfinite(max);
    if (finite) {
      for (uint32_t i = 0; i < count; ++i) finite &= std::isfinite(row[i]);
    }
    if (!finite) {
      Saturate(row, count);
      max = std::max(old, MaxOf(row, count));
    }
    if (max != old) {
      const float keep = states.denom[h] > 0 ? std::exp(old - max) : 0.0f;
      float* out = states.row(h);
      for (uint32_t j = 0; j < states.head_dim; ++j) out[j] *= keep;
      states.denom[h] *= keep;
      states.max[h] = max;
    }
    states.denom[h] += ExpShifted(row, count, max, row);
  }
}

class CpuAttention final : public AttentionBackend {
 public:
  const char* name() const override { return "cpu"; }
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
    KV_CHECK(states.head_dim == rows.head_dim && states.heads <= limits::kGroupMax);
    for (uint32_t r = 0; r < rows.count; r += kBlockRows) {
      const size_t at = r * rows.row_bytes();
      const Run run{rows.k + at, rows.v + at, std::min(kBlockRows, rows.count - r)};
      AttendBlock(queries, rows.dtype, {&run, 1}, states);
    }
  }

  void AddPages(const float* queries, const PagedKv& kv, std::span<const PageId> pages,
                const AttentionStateRef& states) {
    KV_CHECK(states.head_dim == kv.head_dim && states.heads <= limits::kGroupMax);
    std::array<Run, kPagesPerBlock> runs;
    for (size_t begin = 0; begin < pages.size(); begin += kPagesPerBlock) {
      const size_t count = std::min<size_t>(kPagesPerBlock, pages.size() - begin);
      for (size_t i = 0; i < count; ++i) {
        KV_CHECK(pages[begin + i].value < kv.page_count);
        const PageView& page = kv.pages[pages[begin + i].value];
        KV_CHECK(page.k != nullptr && page.fill <= limits::kPageTokens);
        runs[i] = {page.k, page.v, page.fill};
        // Pages lie apart, so the hardware has no stream to follow into the V rows.
        const size_t bytes = page.fill * kv.row_bytes();
        for (size_t at = 0; at < bytes; at += 256) __builtin_prefetch(page.v + at);
      }
      AttendBlock(queries, kv.dtype, {runs.data(), count}, states);
    }
  }

  void AttendBlock(const float* queries, DType dtype, std::span<const Run> runs,
                   const AttentionStateRef& states) {
    const uint32_t dim = states.head_dim;
    uint32_t count = 0;
    for (const Run& run : runs) {
      DotRows(queries, states.heads, run.k, dtype, run.count, dim, scores_.data() + count,
              kBlockRows);
      count += run.count;
    }
    ScoresToWeights(scores_.data(), count, states);
    count = 0;
    for (const Run& run : runs) {
      AddWeightedRows(scores_.data() + count, kBlockRows, states.heads, run.v, dtype, run.count,
                      dim, states.out);
      count += run.count;
    }
  }

  alignas(64) std::array<float, size_t{limits::kGroupMax} * kBlockRows> scores_;
};

}  // namespace

std::unique_ptr<AttentionBackend> MakeCpuAttention() { return std::make_unique<CpuAttention>(); }

}  // namespace icecache
