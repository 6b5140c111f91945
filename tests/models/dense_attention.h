// DenseAttention: a LayerAttention that keeps every key and value in f32 and attends to all of
// them. The plainest implementation of the seam, for tests of models; works for any division into
// blocks.
#pragma once

#include <vector>

#include "worker/model/model.h"
#include "worker/model/prefill_attention.h"

namespace icecache {

class DenseAttention final : public LayerAttention {
 public:
  explicit DenseAttention(const ModelShape& shape, uint32_t threads = 1)
      : shape_(shape), threads_(threads), layers_(shape.layers) {}

  Status Attend(LayerId layer, TokenPos, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override {
    Kept& kept = layers_[layer.value];
    const size_t row = size_t{shape_.kv_heads} * shape_.head_dim;
    const auto past = static_cast<uint32_t>(kept.k.size() / row);
    kept.k.insert(kept.k.end(), k, k + tokens * row);
    kept.v.insert(kept.v.end(), v, v + tokens * row);
    return CausalAttention(shape_, CausalBlock{past, tokens, q, kept.k.data(), kept.v.data(), out},
                           threads_, {});
  }

 private:
  struct Kept {
    std::vector<float> k, v;
  };
  const ModelShape shape_;
  const uint32_t threads_;
  std::vector<Kept> layers_;
};

// Runs a block through all layers and returns the logits of its tokens, [tokens][vocab].
inline Result<std::vector<std::vector<float>>> RunBlock(Model& model, LayerAttention& attention,
                                                        std::span<const int32_t> tokens,
                                                        uint32_t first) {
  std::vector<float> hidden(tokens.size() * model.hidden_size());
  KV_RETURN_IF_ERROR(model.Embed(tokens, hidden.data()));
  for (uint16_t layer = 0; layer < model.shape().layers; ++layer) {
    KV_RETURN_IF_ERROR(model.Layer(LayerId(layer), TokenPos(first),
                                   static_cast<uint32_t>(tokens.size()), hidden.data(), attention));
  }
  std::vector<std::vector<float>> logits(tokens.size(), std::vector<float>(model.vocab_size()));
  for (size_t i = 0; i < tokens.size(); ++i) {
    model.Logits(hidden.data() + i * model.hidden_size(), logits[i].data());
  }
  return logits;
}

}  // namespace icecache
