// Model: the seam between a decoder-only transformer and what serves its attention.
//
// A model runs one layer at a time over a block of tokens. It computes q, k, v (RoPE applied) and
// hands them to LayerAttention, which stores k and v wherever it likes and answers with the
// attention output. So full KV in the worker, the exact top-k oracle, sink + window only and
// icecache are four LayerAttentions over the same model code, and prefill can run all tokens of one
// layer before the next.
//
// Thread: one model object per thread; weights are mapped read-only and shared through the page
// cache.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/status.h"

namespace icecache {

// Attention for one layer and a block of consecutive tokens. Implementations: worker/attention_*.h.
class LayerAttention {
 public:
  virtual ~LayerAttention() = default;
  // q: [tokens, query_heads, head_dim] scaled by 1/sqrt(head_dim); k, v: [tokens, kv_heads,
  // head_dim]; out: [tokens, query_heads, head_dim]. Token i is at position first + i and sees
  // positions <= its own. Called once per (block, layer) in ascending position order within a
  // layer.
  virtual Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                        const float* k, const float* v, float* out) = 0;
};

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelShape& shape() const = 0;  // dtype: of the stored KV, chosen at load
  virtual uint32_t vocab_size() const = 0;
  virtual uint32_t hidden_size() const = 0;
  virtual std::string identity()
      const = 0;  // family, file name and a hash of config and weights' header

  // hidden[tokens, hidden_size] = embeddings. INVALID_ARGUMENT for a token id outside the
  // vocabulary.
  virtual Status Embed(std::span<const int32_t> tokens, float* hidden) = 0;
  // Runs one layer in place: hidden[tokens, hidden_size].
  virtual Status Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
                       LayerAttention& attention) = 0;
  // logits[vocab_size] of one token's final hidden state.
  virtual void Logits(const float* hidden, float* logits) = 0;
};

struct ModelOptions {
  DType kv_dtype = DType::kF16;
  uint32_t threads = 1;  // of the GEMMs
};
// Loads a Hugging Face directory (config.json, model.safetensors or its sharded index). Errors name
// file, tensor, expected and found. Weights stay mapped in their own dtype or are converted to f32
// once, whichever computes faster.
Result<std::unique_ptr<Model>> LoadModel(const std::string& directory, const ModelOptions& options);

}  // namespace icecache
