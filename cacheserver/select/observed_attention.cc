#include "cacheserver/select/observed_attention.h"

#include <algorithm>
#include <cstring>

#include "cacheserver/select/exact_pages.h"
#include "kernels/distance.h"

namespace icecache {
namespace {
constexpr uint32_t kQueries = 32;
}  // namespace

std::vector<float> ObserveAttention(const TokenRows& rows, const BuildHints& hints,
                                    uint32_t queries_max) {
  std::vector<float> score(rows.count, 0.0f);
  if (hints.queries.empty() || rows.count == 0) return score;
  const size_t group_size = size_t{hints.query_group} * rows.head_dim;
  const size_t groups = hints.queries.size() / group_size;
  const size_t seen = std::min<size_t>(groups, queries_max);
  std::vector<float> x(size_t{hints.query_group} * rows.count);
  for (size_t g = groups - seen; g < groups; ++g) {
    DotRows(hints.queries.data() + g * group_size, hints.query_group, rows.k, rows.dtype,
            rows.count, rows.head_dim, x.data(), rows.count);
    for (uint32_t h = 0; h < hints.query_group; ++h) {
      float* row = x.data() + size_t{h} * rows.count;
      for (uint32_t t = 0; t < rows.count; ++t) row[t] = SaturatedLogit(row[t]);
      const float sum = ExpShifted(row, rows.count, MaxOf(row, rows.count), row);
      const float part = 1.0f / (sum * static_cast<float>(seen * hints.query_group));
      for (uint32_t t = 0; t < rows.count; ++t) score[t] += part * row[t];
    }
  }
  return score;
}

ObservedTokens::ObservedTokens(PolicyKind kind, const PolicyOptions& options)
    : ArrivalPolicy(kind, options, {.token = sizeof(float)}) {}

void ObservedTokens::Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) {
  const std::vector<float> score = ObserveAttention(rows, hints, kQueries);
  std::memcpy(cells, score.data(), score.size() * sizeof(float));
}

std::string ObservedTokens::Wrong() const {
  for (uint32_t i = 0; i < slots(); ++i) {
    const float score = records<float>()[i];
    if (!(score >= 0 && score <= 1.001f)) return "an observed score is no share";
  }
  return {};
}

}  // namespace icecache
