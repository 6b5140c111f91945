#include "worker/decode_loop.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/limits.h"
#include "worker/token_loop.h"

namespace icecache {

DecodeLoop::DecodeLoop(Model& model, DecodeAttention& attention, std::function<Status()> pump)
    : model_(model), attention_(attention), pump_(std::move(pump)), hidden_(model.hidden_size()) {}

void DecodeLoop::Begin(uint32_t next, std::span<const float> last_hidden) {
  next_ = next;
  logits_.clear();
  if (last_hidden.empty()) return;
  KV_CHECK(last_hidden.size() == hidden_.size());
  logits_.resize(model_.vocab_size());
  model_.Logits(last_hidden.data(), logits_.data());
}

Status DecodeLoop::Feed(int32_t token) {
  if (next_ >= limits::kContextTokensMax) {
    return OutOfRange("the sequence has reached " + std::to_string(next_) +
                      " tokens, the maximum of a context");
  }
  {
    const AttentionTimer timer(&total_);
    KV_RETURN_IF_ERROR(model_.Embed({&token, 1}, hidden_.data()));
    for (uint16_t l = 0; l < model_.shape().layers; ++l) {
      KV_RETURN_IF_ERROR(model_.Layer(LayerId(l), TokenPos(next_), 1, hidden_.data(), attention_));
    }
    logits_.resize(model_.vocab_size());
    model_.Logits(hidden_.data(), logits_.data());
  }
  ++next_;
  ++tokens_;
  return pump_ ? pump_() : OkStatus();
}

Status DecodeLoop::Generate(Sampler& sampler, uint32_t count, std::span<const int32_t> stop,
                            const std::function<bool(int32_t)>& on_token) {
  for (uint32_t i = 0; i < count; ++i) {
    KV_CHECK(!logits_.empty());
    const int32_t token = sampler.Sample(logits_);
    if (std::find(stop.begin(), stop.end(), token) != stop.end()) return OkStatus();
    if (!on_token(token) || i + 1 == count) return OkStatus();
    KV_RETURN_IF_ERROR(Feed(token));
  }
  return OkStatus();
}

DecodeStats DecodeLoop::stats() const {
  DecodeStats stats;
  stats.tokens = tokens_;
  stats.total = total_;
  stats.attention = attention_.stats();
  stats.kv_bytes = attention_.kv_bytes();
  stats.full_kv_bytes = uint64_t{next_} * model_.shape().token_bytes();
  return stats;
}

void DecodeLoop::ResetStats() {
  tokens_ = 0;
  total_ = Duration(0);
  attention_.ResetStats();
}

}  // namespace icecache
