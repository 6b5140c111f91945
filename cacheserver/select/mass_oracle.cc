#include "cacheserver/select/mass_oracle.h"

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"

namespace icecache {
namespace {

constexpr float kMass = 0.95f;

class MassOracle final : public ArrivalPolicy {
 public:
  explicit MassOracle(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kMass, options, {}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, rank;
    if (!Start(request, kv, out)) return;
    SelectRequest target = request;
    if (target.min_mass <= 0) target.min_mass = kMass;
    ScoreAllTokens(request, kv, &logits);
    RankUnits(request, request.rank, logits, &rank);
    ChooseTokens(rank, {}, target, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeMassOracle(const PolicyOptions& options) {
  return std::make_unique<MassOracle>(options);
}

}  // namespace icecache
