#include "cacheserver/select/snapkv.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "cacheserver/select/observed_attention.h"

namespace icecache {
namespace {

constexpr uint32_t kQueries = 32, kReach = 3;  // a kernel of 7
constexpr float kGenerated = -1.0f;            // the cell of a token that came after the build
constexpr float kRecent = 2.0f;                // above any share of attention

class SnapKv final : public ArrivalPolicy {
 public:
  explicit SnapKv(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kSnapKv, options, {.token = sizeof(float)}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> rank;
    if (!Start(request, kv, out)) return;
    const float* score = records<float>();
    rank.resize(slots());
    uint32_t left = request.max_pages * limits::kPageTokens / 2;
    for (uint32_t p = page_count(); p > 0; --p) {
      for (uint32_t r = fill(p - 1); r > 0; --r) {
        const uint32_t slot = (p - 1) * limits::kPageTokens + r - 1;
        rank[slot] = std::max(0.0f, score[slot]);
        if (score[slot] != kGenerated || left == 0) continue;
        rank[slot] = kRecent;
        --left;
      }
    }
    ChooseTokens(rank, {}, request, kv, out);
  }

 private:
  void Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) override {
    if (tokens() > rows.count || (rows.count == 1 && hints.queries.empty())) {
      std::memcpy(cells, &kGenerated, sizeof(kGenerated));
      return;
    }
    const std::vector<float> score = ObserveAttention(rows, hints, kQueries);
    std::vector<float> pooled(rows.count);
    for (uint32_t t = 0; t < rows.count; ++t) {
      const uint32_t first = t > kReach ? t - kReach : 0;
      const uint32_t end = std::min(rows.count, t + kReach + 1);
      pooled[t] = *std::max_element(score.begin() + first, score.begin() + end);
    }
    std::memcpy(cells, pooled.data(), pooled.size() * sizeof(float));
  }
  std::string Wrong() const override {
    for (uint32_t i = 0; i < slots(); ++i) {
      const float score = records<float>()[i];
      if (!(score == kGenerated || (score >= 0 && score <= 1.001f)))
        return "an observed score is no share";
    }
    return {};
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeSnapKv(const PolicyOptions& options) {
  return std::make_unique<SnapKv>(options);
}

}  // namespace icecache
