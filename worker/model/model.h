// Model: the seam between a decoder-only transformer and what serves its attention.
//
// A model computes q, k, v of a layer (RoPE applied) and hands them to LayerAttention, which stores
// k and v wherever it likes and answers with the attention output. So full KV in the worker, the
// exact top-k oracle, sink + window only and icecache are four LayerAttentions over the same model
// code.
//
// Two ways through it. Prefill takes a block of tokens of one sequence a layer at a time (Embed,
// Layer ..., Logits), so that all tokens of one layer can go before the next. Decoding takes one
// token of each of several sequences through all layers (Step, then Choose): what lies between the
// layers stays inside, on a GPU in its memory.
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
#include "worker/model/sampler.h"

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

// One sequence's token in a Step, and where it stands there.
struct StepToken {
  int32_t token = 0;
  TokenPos position;
};

// Attention for one layer and one token of each of several sequences. Implementations:
// worker/model/step_attention.h, worker/batch_attention.h.
class StepAttention {
 public:
  virtual ~StepAttention() = default;
  // Where it writes `out`: true: by queued work of the device that the model runs on, into its
  // memory (or pinned); false: in the host's. REQUIRES of a model on the CPU: false.
  virtual bool on_device() const = 0;
  // As LayerAttention::Attend, but row i is of sequence i and its token's position. An error ends
  // the step for all; what befalls one sequence alone is kept for its owner.
  virtual Status AttendStep(LayerId layer, std::span<const StepToken> tokens, const float* q,
                            const float* k, const float* v, float* out) = 0;
};

// Which row of a step chooses a token, and how.
struct TokenChoice {
  uint32_t row = 0;
  Draw draw;
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

  // 1 to limits::kSelectsPerBatchMax rows through all layers. INVALID_ARGUMENT and OUT_OF_RANGE as
  // above, before anything ran. A row's result does not depend on the other rows; on the CPU, up
  // to 16 of them, not even by rounding (where widths are multiples of 16).
  virtual Status Step(std::span<const StepToken> tokens, StepAttention& attention) = 0;
  // logits[vocab_size] of a row of the last Step.
  virtual Status StepLogits(uint32_t row, float* logits) = 0;
  // tokens[i] = what follows row choices[i].row of the last Step. One product for all of them.
  virtual Status Choose(std::span<const TokenChoice> choices, int32_t* tokens) = 0;
};

// INVALID_ARGUMENT or OUT_OF_RANGE unless Step may be asked for these. For implementations.
Status CheckStep(std::span<const StepToken> tokens);

struct ModelOptions {
  DType kv_dtype = DType::kF16;
  uint32_t threads = 1;  // of the GEMMs
};
// Loads a Hugging Face directory (config.json, model.safetensors or its sharded index). Errors name
// file, tensor, expected and found. Weights stay mapped in their own dtype or are converted to f32
// once, whichever computes faster.
Result<std::unique_ptr<Model>> LoadModel(const std::string& directory, const ModelOptions& options);

}  // namespace icecache
