#include "worker/prefetch.h"

#include <algorithm>
#include <cmath>

namespace icecache {

float SmallestCosine(const float* before, const float* now, uint32_t group, uint32_t dim) {
  float smallest = 1;
  for (uint32_t g = 0; g < group; ++g) {
    float ab = 0, aa = 0, bb = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      const float a = before[size_t{g} * dim + d], b = now[size_t{g} * dim + d];
      ab += a * b;
      aa += a * a;
      bb += b * b;
    }
    const float norm = std::sqrt(aa) * std::sqrt(bb);
    const float cosine = norm > 0 ? ab / norm : aa == bb ? 1.0f : 0.0f;
    smallest = std::min(smallest, cosine);
  }
  return smallest;
}

std::vector<KvHeadId> MovedHeads(const ModelShape& shape, const float* before, const float* now,
                                 float min_cosine) {
  std::vector<KvHeadId> moved;
  const size_t group_floats = size_t{shape.group()} * shape.head_dim;
  for (uint16_t h = 0; h < shape.kv_heads; ++h) {
    const size_t at = h * group_floats;
    // Not "below": a NaN has moved.
    if (!(SmallestCosine(before + at, now + at, shape.group(), shape.head_dim) >= min_cosine)) {
      moved.emplace_back(h);
    }
  }
  return moved;
}

}  // namespace icecache
