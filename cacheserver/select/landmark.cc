#include "cacheserver/select/landmark.h"

#include <algorithm>
#include <cmath>

#include "cacheserver/select/page_digest.h"

namespace icecache {
namespace {

class Landmark final : public PageDigestPolicy {
 public:
  explicit Landmark(const PolicyOptions& options)
      : PageDigestPolicy(PolicyKind::kLandmark, options, options.head_dim) {}

 private:
  void Transform(const float* q, float* to) const override {
    std::copy_n(q, options().head_dim, to);
  }
  void Digest(const float* rows, uint32_t count, float* digest) const override {
    const uint32_t dim = options().head_dim;
    const float part = 1.0f / static_cast<float>(count);
    std::fill_n(digest, dim, 0.0f);
    for (uint32_t r = 0; r < count; ++r)
      for (uint32_t j = 0; j < dim; ++j) digest[j] += part * rows[size_t{r} * dim + j];
  }
  float Mass(uint32_t fill) const override { return std::log(static_cast<float>(fill)); }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeLandmark(const PolicyOptions& options) {
  return std::make_unique<Landmark>(options);
}

}  // namespace icecache
