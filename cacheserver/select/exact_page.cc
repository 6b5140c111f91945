#include "cacheserver/select/exact_page.h"

#include <cmath>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

class ExactPage final : public ArrivalPolicy {
 public:
  explicit ExactPage(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kExactPage, options, {}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, mass, top;
    if (!Start(request, kv, out)) return;
    ScoreAllTokens(request, kv, &logits);
    mass.assign(size_t{request.group} * page_count(), kEmptyMax);
    top.assign(mass.size(), kEmptyMax);
    float weights[limits::kPageTokens];
    for (size_t i = 0; i < mass.size(); ++i) {  // [head][page]
      const float* x = logits.data() + i * limits::kPageTokens;
      top[i] = MaxOf(x, limits::kPageTokens);
      if (top[i] != kEmptyMax)
        mass[i] = top[i] + std::log(ExpShifted(x, limits::kPageTokens, top[i], weights));
    }
    ChoosePages({request.group, page_count(), page_count(), mass.data(), top.data()}, request, kv,
                out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeExactPage(const PolicyOptions& options) {
  return std::make_unique<ExactPage>(options);
}

}  // namespace icecache
