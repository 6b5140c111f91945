#include "worker/prefill.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <string>

#include "common/limits.h"
#include "worker/model/prefill_attention.h"
#include "worker/prefill_device.h"

namespace icecache {
namespace {

// Queries of so many last tokens stand for the queries to come.
constexpr uint32_t kEnergyTokens = 256;

// Tokens per call of Model::Layer. The loop must turn several times a second (heartbeats), so a
// block grows only while it is quick.
constexpr uint32_t kBlockMin = 32;
constexpr uint32_t kBlockMax = 1024;
constexpr Duration kBlockTime = std::chrono::milliseconds(60);

// Dense attention of the layer at hand; K and V gather in one buffer that is reused by every layer.
class PrefillAttention final : public LayerAttention {
 public:
  PrefillAttention(const ModelShape& shape, uint32_t total, const PrefillOptions& options)
      : shape_(shape),
        total_(total),
        options_(options),
        k_(size_t{total} * shape.kv_heads * shape.head_dim),
        v_(k_.size()),
        query_tokens_(std::min(options.query_tokens, total)) {
    if (options.device != nullptr) on_device_.emplace(*options.device, shape, total);
  }

  void BeginLayer() {
    rows_ = std::make_shared<LayerRows>(shape_, TokenPos(0), total_);
    energy_.assign(size_t{shape_.kv_heads} * shape_.head_dim, 0);
    queries_.assign(size_t{query_tokens_} * shape_.query_heads * shape_.head_dim, 0);
  }

  FinishedLayer EndLayer(LayerId layer) {
    const uint32_t tokens = std::min(kEnergyTokens, total_);
    for (float& e : energy_) e /= static_cast<float>(tokens * shape_.group());
    return {layer, std::move(rows_), std::move(energy_), std::move(queries_)};
  }

  Status Attend(LayerId, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override {
    const size_t row = size_t{shape_.kv_heads} * shape_.head_dim;
    float* const k_block = k_.data() + first.value * row;
    float* const v_block = v_.data() + first.value * row;
    std::memcpy(k_block, k, tokens * row * sizeof(float));
    std::memcpy(v_block, v, tokens * row * sizeof(float));
    rows_->RoundAndStore(first.value, tokens, k_block, v_block);
    AddEnergy(first.value, tokens, q);
    KeepQueries(first.value, tokens, q);
    if (on_device_) return on_device_->Attend(first.value, tokens, q, *rows_, out);
    Status stopped;
    const Status status =
        CausalAttention(shape_, CausalBlock{first.value, tokens, q, k_.data(), v_.data(), out},
                        options_.threads, [&](uint64_t, uint64_t) {
                          if (options_.pump && stopped.ok()) stopped = options_.pump();
                          return stopped.ok();
                        });
    return stopped.ok() ? status : stopped;
  }

 private:
  void AddEnergy(uint32_t first, uint32_t tokens, const float* q) {
    const uint32_t begin = total_ - std::min(kEnergyTokens, total_);
    for (uint32_t t = std::max(first, begin); t < first + tokens; ++t) {
      const float* const queries = q + size_t{t - first} * shape_.query_heads * shape_.head_dim;
      for (uint32_t h = 0; h < shape_.query_heads; ++h) {
        float* const energy = energy_.data() + size_t{h / shape_.group()} * shape_.head_dim;
        for (uint32_t d = 0; d < shape_.head_dim; ++d) {
          const float x = queries[size_t{h} * shape_.head_dim + d];
          energy[d] += x * x;
        }
      }
    }
  }

  void KeepQueries(uint32_t first, uint32_t tokens, const float* q) {
    const uint32_t begin = total_ - query_tokens_;
    const size_t group = size_t{shape_.group()} * shape_.head_dim;
    for (uint32_t t = std::max(first, begin); t < first + tokens; ++t) {
      for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
        const float* const from = q + (size_t{t - first} * shape_.kv_heads + h) * group;
        std::copy_n(from, group, queries_.data() + (size_t{h} * query_tokens_ + t - begin) * group);
      }
    }
  }

  const ModelShape shape_;
  const uint32_t total_;
  const PrefillOptions& options_;
  std::vector<float> k_, v_;  // [total, kv_heads, head_dim]
  const uint32_t query_tokens_;
  std::shared_ptr<LayerRows> rows_;
  std::optional<DevicePrefill> on_device_;
  std::vector<float> energy_, queries_;
};

}  // namespace

Result<std::vector<float>> Prefill(Model& model, std::span<const int32_t> tokens,
                                   const PrefillOptions& options,
                                   const std::function<Status(FinishedLayer)>& on_layer) {
  if (tokens.empty() || tokens.size() > limits::kContextTokensMax) {
    return InvalidArgument("prompt of " + std::to_string(tokens.size()) +
                           " tokens, expected 1 to " + std::to_string(limits::kContextTokensMax));
  }
  const uint32_t total = static_cast<uint32_t>(tokens.size());
  const size_t width = model.hidden_size();
  std::vector<float> hidden(total * width);
  KV_RETURN_IF_ERROR(model.Embed(tokens, hidden.data()));
  PrefillAttention attention(model.shape(), total, options);
  const uint64_t work = uint64_t{total} * model.shape().layers;
  uint64_t done = 0;
  uint32_t block = kBlockMin;
  for (uint16_t l = 0; l < model.shape().layers; ++l) {
    attention.BeginLayer();
    for (uint32_t first = 0; first < total;) {
      const auto start = std::chrono::steady_clock::now();
      const uint32_t count = std::min(block, total - first);
      KV_RETURN_IF_ERROR(model.Layer(LayerId(l), TokenPos(first), count,
                                     hidden.data() + first * width, attention));
      first += count;
      done += count;
      if (options.progress) options.progress(done, work);
      if (options.pump) KV_RETURN_IF_ERROR(options.pump());
      const Duration took = std::chrono::steady_clock::now() - start;
      if (took < kBlockTime && count == block) block = std::min(kBlockMax, 2 * block);
      if (took > 4 * kBlockTime) block = std::max(kBlockMin, block / 2);
    }
    KV_RETURN_IF_ERROR(on_layer(attention.EndLayer(LayerId(l))));
  }
  return std::vector<float>(hidden.end() - static_cast<ptrdiff_t>(width), hidden.end());
}

}  // namespace icecache
