#include "cacheserver/select/streaming_llm.h"

#include <numeric>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"

namespace icecache {
namespace {

class StreamingLlm final : public ArrivalPolicy {
 public:
  explicit StreamingLlm(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kStreamingLlm, options, {}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> rank, weight;
    if (!Start(request, kv, out)) return;
    rank.resize(slots());
    std::iota(rank.begin(), rank.end(), 0.0f);
    weight = rank;
    if (request.residual) weight.assign(slots(), 1.0f);  // else the newest pages weigh most
    ChooseTokens(rank, weight, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeStreamingLlm(const PolicyOptions& options) {
  return std::make_unique<StreamingLlm>(options);
}

}  // namespace icecache
