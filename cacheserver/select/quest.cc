#include "cacheserver/select/quest.h"

#include <algorithm>

#include "cacheserver/select/page_digest.h"

namespace icecache {
namespace {

class Quest final : public PageDigestPolicy {
 public:
  explicit Quest(const PolicyOptions& options)
      : PageDigestPolicy(PolicyKind::kQuest, options, 2 * options.head_dim) {}

 private:
  void Transform(const float* q, float* to) const override {
    const uint32_t dim = options().head_dim;
    for (uint32_t j = 0; j < dim; ++j) {
      to[j] = std::min(q[j], 0.0f);
      to[dim + j] = std::max(q[j], 0.0f);
    }
  }
  void Digest(const float* rows, uint32_t count, float* digest) const override {
    Bounds(rows, count, options().head_dim, digest, digest + options().head_dim);
  }
  float Mass(uint32_t) const override { return 0; }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeQuest(const PolicyOptions& options) {
  return std::make_unique<Quest>(options);
}

}  // namespace icecache
