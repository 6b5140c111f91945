#include "cacheserver/select/exact_token.h"

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"

namespace icecache {
namespace {

class ExactToken final : public ArrivalPolicy {
 public:
  explicit ExactToken(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kExactToken, options, {}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, rank;
    if (!Start(request, kv, out)) return;
    ScoreAllTokens(request, kv, &logits);
    RankUnits(request, request.rank, logits, &rank);
    ChooseTokens(rank, {}, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeExactToken(const PolicyOptions& options) {
  return std::make_unique<ExactToken>(options);
}

}  // namespace icecache
