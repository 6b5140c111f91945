#include "cacheserver/select/twilight.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cacheserver/select/page_digest.h"

namespace icecache {
namespace {

constexpr float kTarget = 0.85f;
constexpr uint32_t kGenerous = 8;  // budgets of candidates
constexpr uint32_t kRows = limits::kPageTokens;

// A page's record: low[dim], high[dim], then per row its smallest value, its step, and its codes.
class Twilight final : public ArrivalPolicy {
 public:
  explicit Twilight(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kTwilight, options,
                      {.page = (2 * size_t{options.head_dim} + 2 * kRows) * sizeof(float) +
                               kRows * options.head_dim / 2}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, rank;
    thread_local std::vector<uint32_t> candidates;
    if (!Start(request, kv, out)) return;
    Candidates(request, &candidates);
    logits.assign(size_t{request.group} * slots(), kEmptyMax);
    for (const uint32_t p : candidates) Estimate(request, p, logits.data());
    RankUnits(request, request.rank, logits, &rank);
    SelectRequest target = request;
    if (request.residual && target.min_mass <= 0) target.min_mass = kTarget;
    ChooseTokens(rank, {}, target, kv, out);
  }

 private:
  size_t stride() const {
    return (2 * size_t{options().head_dim} + 2 * kRows) * sizeof(float) +
           size_t{kRows} * options().head_dim / 2;
  }
  const float* bounds(uint32_t page) const {
    return reinterpret_cast<const float*>(records<uint8_t>() + page * stride());
  }
  const float* scales(uint32_t page) const { return bounds(page) + 2 * options().head_dim; }
  const uint8_t* codes(uint32_t page) const {
    return reinterpret_cast<const uint8_t*>(scales(page) + 2 * kRows);
  }

  // The pages with the largest Quest bound, 8 budgets of them.
  void Candidates(const SelectRequest& request, std::vector<uint32_t>* best) const {
    thread_local std::vector<float> split, bound, rank;
    const uint32_t dim = options().head_dim, group = request.group;
    split.resize(2 * size_t{group} * dim);
    for (uint32_t h = 0; h < group; ++h) {
      for (uint32_t j = 0; j < dim; ++j) {
        const float q = request.queries[size_t{h} * dim + j];
        split[2 * size_t{h} * dim + j] = std::min(q, 0.0f);
        split[(2 * size_t{h} + 1) * dim + j] = std::max(q, 0.0f);
      }
    }
    bound.resize(size_t{group} * page_count());
    for (uint32_t p = 0; p < page_count(); ++p)
      DotRows(split.data(), group, reinterpret_cast<const std::byte*>(bounds(p)), DType::kF32, 1,
              2 * dim, bound.data() + p, page_count());
    for (float& x : bound) x = SaturatedLogit(x);
    RankUnits(request, request.rank, bound, &rank);
    TopPages(rank, std::min(page_count(), kGenerous * request.max_pages), best);
  }

  // Logits of a page's tokens from their codes.
  void Estimate(const SelectRequest& request, uint32_t page, float* logits) const {
    const uint32_t dim = options().head_dim;
    float keys[kRows * limits::kHeadDimMax];
    for (uint32_t r = 0; r < fill(page); ++r) {
      const float low = scales(page)[2 * r], step = scales(page)[2 * r + 1];
      const uint8_t* code = codes(page) + size_t{r} * dim / 2;
      for (uint32_t j = 0; j < dim / 2; ++j) {
        keys[size_t{r} * dim + j] = low + step * static_cast<float>(code[j] & 15);
        keys[size_t{r} * dim + dim / 2 + j] = low + step * static_cast<float>(code[j] >> 4);
      }
    }
    DotRows(request.queries, request.group, reinterpret_cast<const std::byte*>(keys), DType::kF32,
            fill(page), dim, logits + size_t{page} * kRows, slots());
    for (uint32_t h = 0; h < request.group; ++h) {
      float* x = logits + size_t{h} * slots() + size_t{page} * kRows;
      for (uint32_t r = 0; r < fill(page); ++r) x[r] = SaturatedLogit(x[r]);
    }
  }

  void Summarise(const TokenRows& page, uint8_t* record) const override {
    const uint32_t dim = options().head_dim;
    std::memset(record, 0, stride());
    auto* bound = reinterpret_cast<float*>(record);
    float* scale = bound + 2 * size_t{dim};
    auto* code = reinterpret_cast<uint8_t*>(scale + 2 * kRows);
    float rows[kRows * limits::kHeadDimMax];
    ToF32(page.k, page.dtype, size_t{page.count} * dim, rows);
    Bounds(rows, page.count, dim, bound, bound + dim);
    for (uint32_t r = 0; r < page.count; ++r, code += dim / 2) {
      const float* row = rows + size_t{r} * dim;
      const auto [low, high] = std::minmax_element(row, row + dim);
      scale[2 * r] = *low;
      const float step = scale[2 * r + 1] = *high / 15 - *low / 15;
      const auto quantised = [&](float x) {
        const float level = step > 0 ? std::round(x / step - *low / step) : 0.0f;
        return static_cast<uint8_t>(std::clamp(level, 0.0f, 15.0f));
      };
      for (uint32_t j = 0; j < dim / 2; ++j)
        code[j] = static_cast<uint8_t>(quantised(row[j]) | quantised(row[dim / 2 + j]) << 4);
    }
  }
  std::string Wrong() const override {
    const size_t floats = 2 * size_t{options().head_dim} + 2 * kRows;
    for (uint32_t p = 0; p < page_count(); ++p)
      if (!AllFinite(reinterpret_cast<const std::byte*>(bounds(p)), DType::kF32, floats))
        return "a bound is NaN or infinite";
    return {};
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeTwilight(const PolicyOptions& options) {
  return std::make_unique<Twilight>(options);
}

}  // namespace icecache
