#include "worker/attention_sink_window.h"

#include "worker/token_loop.h"

namespace icecache {

Status AttentionSinkWindow::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                                   const float* k, const float* v, float* out) {
  return ForEachToken(shape_, first, tokens, q, k, v, out, [&](const TokenCall& call) -> Status {
    const AttentionTimer timer(&stats_.attention);
    token_.StoreToken(call.position, call.k, call.v);
    (void)window_.Append(layer, token_, &left_);
    states_.Reset(shape_.query_heads, shape_.head_dim);
    uint32_t attended = 0;
    items_.clear();
    for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
      attended = 0;
      for (const TokenRows& rows :
           {window_.sinks(layer, KvHeadId(h)), window_.window(layer, KvHeadId(h))}) {
        attended += rows.count;
        if (rows.count == 0) continue;
        items_.push_back({call.queries(shape_, h), GroupStates(shape_, states_, h), rows, {}, {}});
      }
    }
    KV_RETURN_IF_ERROR(AttendTo(backend_, items_, {states_.ref(), call.out}));
    CountAttended(&stats_, shape_.query_heads, attended);
    return OkStatus();
  });
}

}  // namespace icecache
