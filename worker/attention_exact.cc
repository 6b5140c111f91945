#include "worker/attention_exact.h"

#include <algorithm>
#include <numeric>

#include "kernels/distance.h"
#include "worker/token_loop.h"

namespace icecache {
namespace {

TokenRows Slice(const TokenRows& rows, uint32_t begin, uint32_t count) {
  TokenRows slice = rows;
  slice.k += begin * rows.row_bytes();
  slice.v += begin * rows.row_bytes();
  slice.count = count;
  return slice;
}

}  // namespace

void AttentionExact::AttendHead(const float* queries, const TokenRows& rows,
                                const AttentionStateRef& states) {
  const uint32_t sinks = std::min(budget_.sink_tokens, rows.count);
  const uint32_t window = std::min(budget_.window_tokens, rows.count - sinks);
  const uint32_t candidates = rows.count - sinks - window;
  const uint32_t chosen = std::min(budget_.chosen(), candidates);
  for (const TokenRows& fixed : {Slice(rows, 0, sinks), Slice(rows, rows.count - window, window)}) {
    if (fixed.count > 0) items_.push_back({queries, states, fixed, {}, {}});
  }
  if (chosen == 0) return;
  const TokenRows middle = Slice(rows, sinks, candidates);
  scores_.resize(size_t{states.heads} * candidates);
  DotRows(queries, states.heads, middle.k, middle.dtype, candidates, middle.head_dim,
          scores_.data(), candidates);
  value_row_.resize(middle.head_dim);
  order_.resize(candidates);
  for (uint32_t g = 0; g < states.heads; ++g) {
    const float* const scores = scores_.data() + size_t{g} * candidates;
    std::iota(order_.begin(), order_.end(), 0u);
    if (chosen < candidates) {
      std::nth_element(order_.begin(), order_.begin() + chosen, order_.end(),
                       [scores](uint32_t a, uint32_t b) {
                         return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                       });
    }
    for (uint32_t i = 0; i < chosen; ++i) {
      ToF32(middle.v + order_[i] * middle.row_bytes(), middle.dtype, middle.head_dim,
            value_row_.data());
      MergeTerm(scores[order_[i]], 1, value_row_.data(), states, g);
    }
  }
}

Status AttentionExact::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                              const float* k, const float* v, float* out) {
  return ForEachToken(shape_, first, tokens, q, k, v, out, [&](const TokenCall& call) -> Status {
    const AttentionTimer timer(&stats_.attention);
    token_.StoreToken(call.position, call.k, call.v);
    kv_.Append(layer, token_);
    states_.Reset(shape_.query_heads, shape_.head_dim);
    items_.clear();
    for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
      AttendHead(call.queries(shape_, h), kv_.rows(layer, KvHeadId(h)),
                 GroupStates(shape_, states_, h));
    }
    KV_RETURN_IF_ERROR(AttendTo(backend_, items_, {states_.ref(), call.out}));
    const uint32_t fixed = budget_.sink_tokens + budget_.window_tokens;
    CountAttended(&stats_, shape_.query_heads,
                  std::min(kv_.tokens(layer), fixed + budget_.chosen()));
    return OkStatus();
  });
}

}  // namespace icecache
