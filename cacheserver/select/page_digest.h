// A page digest is a vector of `width` floats that a transformed query meets in a dot product: the
// common form of Quest's and ArkVale's boxes and of mean keys.
#pragma once

#include <vector>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "kernels/distance.h"

namespace icecache {

class PageDigestPolicy : public ArrivalPolicy {
 public:
  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const final;

 protected:
  PageDigestPolicy(PolicyKind kind, const PolicyOptions& options, uint32_t width);

  // What meets the digest: to[width] from q[head_dim].
  virtual void Transform(const float* q, float* to) const = 0;
  // The digest of rows[count, head_dim].
  virtual void Digest(const float* rows, uint32_t count, float* digest) const = 0;
  // Added to the dot product of a page with `fill` tokens, to make it a log mass.
  virtual float Mass(uint32_t fill) const = 0;

 private:
  void Summarise(const TokenRows& page, uint8_t* record) const final;
  std::string Wrong() const final;

  const uint32_t width_;
};

// The element-wise smallest and largest of rows[count, dim].
void Bounds(const float* rows, uint32_t count, uint32_t dim, float* low, float* high);

}  // namespace icecache
