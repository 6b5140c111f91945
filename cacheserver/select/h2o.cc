#include "cacheserver/select/h2o.h"

#include <cmath>

#include "cacheserver/select/budget_choice.h"
#include "cacheserver/select/observed_attention.h"

namespace icecache {
namespace {

constexpr float kRecent = 2.0f;  // above any sum of attention, which is at most 1

class H2o final : public ObservedTokens {
 public:
  explicit H2o(const PolicyOptions& options)
      : ObservedTokens(PolicyKind::kH2o, options) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> rank, weight;
    if (!Start(request, kv, out)) return;
    const float* score = records<float>();
    weight.assign(score, score + slots());
    rank = weight;
    uint32_t left = request.max_pages * limits::kPageTokens / 2;
    for (uint32_t p = page_count(); p > 0 && left > 0; --p) {
      for (uint32_t r = fill(p - 1); r > 0 && left > 0; --r, --left)
        rank[(p - 1) * limits::kPageTokens + r - 1] += kRecent;
    }
    ChooseTokens(rank, request.residual ? weight : rank, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeH2o(const PolicyOptions& options) {
  return std::make_unique<H2o>(options);
}

}  // namespace icecache
