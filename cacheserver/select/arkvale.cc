#include "cacheserver/select/arkvale.h"

#include <cmath>

#include "cacheserver/select/page_digest.h"

namespace icecache {
namespace {

class ArkVale final : public PageDigestPolicy {
 public:
  explicit ArkVale(const PolicyOptions& options)
      : PageDigestPolicy(PolicyKind::kArkVale, options, 2 * options.head_dim) {}

 private:
  void Transform(const float* q, float* to) const override {
    const uint32_t dim = options().head_dim;
    for (uint32_t j = 0; j < dim; ++j) {
      to[j] = q[j];
      to[dim + j] = std::abs(q[j]);
    }
  }
  void Digest(const float* rows, uint32_t count, float* digest) const override {
    const uint32_t dim = options().head_dim;
    float* centre = digest;
    float* width = digest + dim;
    Bounds(rows, count, dim, centre, width);
    const float part = 1.0f / static_cast<float>(count);
    for (uint32_t j = 0; j < dim; ++j) {
      centre[j] = 0.5f * centre[j] + 0.5f * width[j];
      width[j] = 0;
      for (uint32_t r = 0; r < count; ++r)
        width[j] += part * std::abs(rows[size_t{r} * dim + j] - centre[j]);
    }
  }
  float Mass(uint32_t) const override { return 0; }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeArkVale(const PolicyOptions& options) {
  return std::make_unique<ArkVale>(options);
}

}  // namespace icecache
