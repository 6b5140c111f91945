#include "cacheserver/select/shadowkv.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kChunk = 8, kChunks = limits::kPageTokens / kChunk;
constexpr float kOutlier = 4.0f;  // above any softmax weight
constexpr float kNoChunk = 2.0f;  // the cosine of a chunk without tokens

class ShadowKv final : public ArrivalPolicy {
 public:
  explicit ShadowKv(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kShadowKv, options,
                      {.page = kChunks * (options.head_dim + 1) * sizeof(float)}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, weight, rank, token_rank, token_weight;
    thread_local std::vector<uint32_t> order;
    if (!Start(request, kv, out)) return;
    const uint32_t chunks = page_count() * kChunks;
    logits.resize(size_t{request.group} * chunks);
    for (uint32_t p = 0; p < page_count(); ++p)
      DotRows(request.queries, request.group, reinterpret_cast<const std::byte*>(landmarks(p)),
              DType::kF32, kChunks, options().head_dim, logits.data() + p * kChunks, chunks);
    for (size_t i = 0; i < logits.size(); ++i)
      logits[i] = cosine(i % chunks) == kNoChunk ? kEmptyMax : SaturatedLogit(logits[i]);
    RankUnits(request, GroupRank::kMassMax, logits, &weight);
    rank = weight;
    // Outliers: the chunks with the smallest cosines.
    order.resize(chunks);
    std::iota(order.begin(), order.end(), 0u);
    const uint32_t outliers = std::min(chunks, request.max_pages * limits::kPageTokens * 24 / 1024);
    const auto stranger = [this](uint32_t a, uint32_t b) {
      return cosine(a) != cosine(b) ? cosine(a) < cosine(b) : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + outliers, order.end(), stranger);
    for (uint32_t i = 0; i < outliers; ++i) rank[order[i]] += kOutlier;
    token_rank.assign(slots(), 0.0f);
    token_weight.assign(slots(), 0.0f);
    for (uint32_t slot = 0; slot < slots(); ++slot) {
      token_rank[slot] = rank[slot / kChunk];
      token_weight[slot] = weight[slot / kChunk];
    }
    ChooseTokens(token_rank, request.residual ? token_weight : token_rank, request, kv, out);
  }

 private:
  size_t stride() const { return kChunks * (size_t{options().head_dim} + 1); }
  const float* landmarks(uint32_t page) const { return records<float>() + page * stride(); }
  // The smallest cosine of a key of the chunk with its landmark.
  float cosine(size_t chunk) const {
    return landmarks(static_cast<uint32_t>(chunk / kChunks))[stride() - kChunks + chunk % kChunks];
  }

  void Summarise(const TokenRows& page, uint8_t* record) const override {
    const uint32_t dim = options().head_dim;
    float* out = reinterpret_cast<float*>(record);
    float rows[limits::kPageTokens * limits::kHeadDimMax];
    ToF32(page.k, page.dtype, size_t{page.count} * dim, rows);
    for (uint32_t c = 0; c < kChunks; ++c) {
      float* mean = out + size_t{c} * dim;
      std::fill_n(mean, dim, 0.0f);
      const uint32_t first = c * kChunk, end = std::min(page.count, first + kChunk);
      float& least = out[stride() - kChunks + c];
      least = kNoChunk;
      if (first >= end) continue;
      const float part = 1.0f / static_cast<float>(end - first);
      for (uint32_t r = first; r < end; ++r)
        for (uint32_t j = 0; j < dim; ++j) mean[j] += part * rows[size_t{r} * dim + j];
      for (uint32_t r = first; r < end; ++r) {
        double dot = 0, a = 0, b = 0;
        for (uint32_t j = 0; j < dim; ++j) {
          const double x = rows[size_t{r} * dim + j], y = mean[j];
          dot += x * y;
          a += x * x;
          b += y * y;
        }
        const double cosine = a > 0 && b > 0 ? dot / std::sqrt(a) / std::sqrt(b) : 1.0;
        least = std::min(least, static_cast<float>(std::clamp(cosine, -1.0, 1.0)));
      }
    }
  }
  std::string Wrong() const override {
    if (!AllFinite(records<std::byte>(), DType::kF32, page_count() * stride()))
      return "a landmark is NaN or infinite";
    return {};
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeShadowKv(const PolicyOptions& options) {
  return std::make_unique<ShadowKv>(options);
}

}  // namespace icecache
