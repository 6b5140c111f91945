#include "cacheserver/select/squeezed.h"

#include "cacheserver/select/clustered_tokens.h"

namespace icecache {
namespace {

class Squeezed final : public ClusteredTokens {
 public:
  explicit Squeezed(const PolicyOptions& options)
      : ClusteredTokens(PolicyKind::kSqueezed, options, {.tokens_per_cluster = 20}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> share;
    if (!Start(request, kv, out)) return;
    WeighTokens(request, &share);
    ChooseTokens(share, {}, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeSqueezed(const PolicyOptions& options) {
  return std::make_unique<Squeezed>(options);
}

}  // namespace icecache
