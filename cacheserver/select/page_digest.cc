#include "cacheserver/select/page_digest.h"

#include <algorithm>
#include <cmath>

namespace icecache {

PageDigestPolicy::PageDigestPolicy(PolicyKind kind, const PolicyOptions& options, uint32_t width)
    : ArrivalPolicy(kind, options, {.page = width * sizeof(float)}), width_(width) {}

void PageDigestPolicy::Summarise(const TokenRows& page, uint8_t* record) const {
  float rows[limits::kPageTokens * limits::kHeadDimMax];
  const uint32_t dim = page.head_dim;
  ToF32(page.k, page.dtype, size_t{page.count} * dim, rows);
  Digest(rows, page.count, reinterpret_cast<float*>(record));
  for (uint32_t j = 0; j < width_; ++j) {
    float& x = reinterpret_cast<float*>(record)[j];
    x = SaturatedLogit(x);  // sums near the largest float
  }
}

std::string PageDigestPolicy::Wrong() const {
  if (!AllFinite(records<std::byte>(), DType::kF32, size_t{page_count()} * width_))
    return "a digest is NaN or infinite";
  return {};
}

void PageDigestPolicy::Select(const SelectRequest& request, const PagedKv& kv,
                              Selection* out) const {
  thread_local std::vector<float> queries, mass, top;
  if (!Start(request, kv, out)) return;
  const uint32_t pages = page_count();
  queries.resize(size_t{request.group} * width_);
  for (uint32_t h = 0; h < request.group; ++h)
    Transform(request.queries + size_t{h} * options().head_dim,
              queries.data() + size_t{h} * width_);
  top.resize(size_t{request.group} * pages);
  mass.resize(top.size());
  DotRows(queries.data(), request.group, records<std::byte>(), DType::kF32, pages, width_,
          top.data(), pages);
  for (uint32_t h = 0; h < request.group; ++h) {
    for (uint32_t p = 0; p < pages; ++p) {
      float& x = top[size_t{h} * pages + p];
      x = SaturatedLogit(x);
      mass[size_t{h} * pages + p] = x + Mass(fill(p));
    }
  }
  ChoosePages({request.group, pages, pages, mass.data(), top.data()}, request, kv, out);
}

void Bounds(const float* rows, uint32_t count, uint32_t dim, float* low, float* high) {
  std::copy(rows, rows + dim, low);
  std::copy(rows, rows + dim, high);
  for (uint32_t r = 1; r < count; ++r) {
    for (uint32_t j = 0; j < dim; ++j) {
      low[j] = std::min(low[j], rows[size_t{r} * dim + j]);
      high[j] = std::max(high[j], rows[size_t{r} * dim + j]);
    }
  }
}

}  // namespace icecache
