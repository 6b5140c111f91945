#include "worker/decode_loop.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/limits.h"
#include "worker/token_loop.h"

namespace icecache {

DecodeLoop::DecodeLoop(Model& model, DecodeAttention& attention, std::function<Status()> pump)
    : model_(model),
      attention_(attention),
      pump_(std::move(pump)),
      step_(model.shape(), {&attention}, attention.on_device()) {}

void DecodeLoop::Begin(uint32_t next, std::span<const float> last_hidden) {
  next_ = next;
  stepped_ = false;
  logits_.clear();
  if (last_hidden.empty()) return;
  KV_CHECK(last_hidden.size() == model_.hidden_size());
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
    const StepToken row{token, TokenPos(next_)};
    KV_RETURN_IF_ERROR(model_.Step({&row, 1}, step_));
    stepped_ = true;
    logits_.clear();
  }
  ++next_;
  ++tokens_;
  return pump_ ? pump_() : OkStatus();
}

Result<int32_t> DecodeLoop::Next(Sampler& sampler) {
  const AttentionTimer timer(&total_);
  if (!stepped_) {
    KV_CHECK(!logits_.empty());
    return sampler.Sample(logits_);
  }
  const TokenChoice choice{0, sampler.Next()};
  int32_t token = 0;
  KV_RETURN_IF_ERROR(model_.Choose({&choice, 1}, &token));
  return token;
}

Result<std::span<const float>> DecodeLoop::Logits() {
  if (logits_.empty()) {
    KV_CHECK(stepped_);
    const AttentionTimer timer(&total_);
    logits_.resize(model_.vocab_size());
    KV_RETURN_IF_ERROR(model_.StepLogits(0, logits_.data()));
  }
  return std::span<const float>(logits_);
}

Status DecodeLoop::Generate(Sampler& sampler, uint32_t count, std::span<const int32_t> stop,
                            const std::function<bool(int32_t)>& on_token) {
  for (uint32_t i = 0; i < count; ++i) {
    KV_ASSIGN_OR_RETURN(const int32_t token, Next(sampler));
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
