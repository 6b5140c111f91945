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
    items_.clear();
    for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
      items_.push_back({call.queries(shape_, h),
                        GroupStates(shape_, states_, h),
                        kv_.rows(layer, KvHeadId(h)),
                        {},
                        {}});
    }
    KV_RETURN_IF_ERROR(AttendTo(backend_, items_, {states_.ref(), call.out}));
    CountAttended(&stats_, shape_.query_heads, kv_.tokens(layer));
    return OkStatus();
  });
}

}  // namespace icecache
