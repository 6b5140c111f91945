#include "cacheserver/select/omnikv.h"

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"

namespace icecache {
namespace {

class OmniKv final : public ArrivalPolicy {
 public:
  explicit OmniKv(const PolicyOptions& options) : ArrivalPolicy(PolicyKind::kOmniKv, options, {}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, rank;
    if (!Start(request, kv, out)) return;
    ScoreAllTokens(request, kv, &logits);
    RankUnits(request, GroupRank::kMassMax, logits, &rank);
    ChooseTokens(rank, {}, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeOmniKv(const PolicyOptions& options) {
  return std::make_unique<OmniKv>(options);
}

}  // namespace icecache
