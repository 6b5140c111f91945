#include "worker/attention_full.h"

#include "worker/token_loop.h"

namespace icecache {

Status AttentionFull::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                             const float* k, const float* v, float* out) {
  return ForEachToken(shape_, first, tokens, q, k, v, out, [&](const TokenCall& call) -> Status {
    const AttentionTimer timer(&stats_.attention);
    token_.StoreToken(call.position, call.k, call.v);
    kv_.Append(layer, token_);
    states_.Reset(shape_.query_heads, shape_.head_dim);
    for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
      backend_.AttendRows(call.queries(shape_, h), kv_.rows(layer, KvHeadId(h)),
                          GroupStates(shape_, states_, h));
    }
    FinishStates(states_.ref(), call.out);
    CountAttended(&stats_, shape_.query_heads, kv_.tokens(layer));
    return OkStatus();
  });
}

}  // namespace icecache
