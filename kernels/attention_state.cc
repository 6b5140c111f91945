#include "kernels/attention_state.h"

#include <algorithm>
#include <cmath>

#include "common/status.h"

namespace icecache {

void AttentionStates::Reset(uint32_t heads, uint32_t head_dim) {
  heads_ = heads;
  head_dim_ = head_dim;
  data_.assign(FlatFloats(heads, head_dim), 0.0f);
  std::fill_n(data_.begin(), heads, kEmptyMax);
}

void MergeStates(const AttentionStateRef& from, const AttentionStateRef& into) {
  KV_CHECK(from.heads == into.heads && from.head_dim == into.head_dim);
  for (uint32_t h = 0; h < into.heads; ++h) {
    if (from.denom[h] == 0.0f) continue;
    const float max = std::max(from.max[h], into.max[h]);
    const float a = into.denom[h] == 0.0f ? 0.0f : std::exp(into.max[h] - max);
    const float b = std::exp(from.max[h] - max);
    float* out = into.row(h);
    const float* add = from.row(h);
    for (uint32_t j = 0; j < into.head_dim; ++j) out[j] = a * out[j] + b * add[j];
    into.denom[h] = a * into.denom[h] + b * from.denom[h];
    into.max[h] = max;
  }
}

void MergeTerm(float logit, float mass, const float* v, const AttentionStateRef& into,
               uint32_t head) {
  if (mass <= 0.0f) return;
  const float max = std::max(logit, into.max[head]);
  const float a = into.denom[head] == 0.0f ? 0.0f : std::exp(into.max[head] - max);
  const float b = mass * std::exp(logit - max);
  float* out = into.row(head);
  for (uint32_t j = 0; j < into.head_dim; ++j) out[j] = a * out[j] + b * v[j];
  into.denom[head] = a * into.denom[head] + b;
  into.max[head] = max;
}

void FinishStates(const AttentionStateRef& state, float* result) {
  for (uint32_t h = 0; h < state.heads; ++h) {
    const float scale = state.denom[h] > 0.0f ? 1.0f / state.denom[h] : 0.0f;
    const float* out = state.row(h);
    for (uint32_t j = 0; j < state.head_dim; ++j)
      result[size_t{h} * state.head_dim + j] = scale * out[j];
  }
}

float LogSumExp(const AttentionStateRef& state, uint32_t head) {
  return state.denom[head] > 0.0f ? state.max[head] + std::log(state.denom[head]) : kEmptyMax;
}

}  // namespace icecache
