// LlamaWeights: the tensors of a model directory by their part in a layer, mapped and checked. What
// the CPU and the GPU run the same forward pass over (llama_model.cc, device_model.cc).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/model/gemm.h"
#include "worker/model/model_config.h"
#include "worker/model/safetensors.h"

namespace icecache {

struct Linear {
  WeightMatrix weight;
  std::vector<float> bias;  // empty: none

  const float* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }
};

struct LayerWeights {
  std::vector<float> input_norm, post_norm;
  std::vector<float> q_norm, k_norm;  // empty: none
  Linear q, k, v, o, gate, up, down;
};

// Immutable after loading; any thread. Matrices point into `files`.
struct LlamaWeights {
  ModelConfig config;
  std::unique_ptr<WeightFiles> files;
  std::string identity;  // Model::identity()
  WeightMatrix embedding, output;
  std::vector<float> final_norm;
  std::vector<LayerWeights> layers;
};

// Errors name file, tensor, expected and found.
Result<LlamaWeights> LoadLlamaWeights(const std::string& directory);

// hidden[tokens, hidden_size] = embeddings. INVALID_ARGUMENT for an id outside the vocabulary.
Status EmbedTokens(const LlamaWeights& weights, std::span<const int32_t> tokens, float* hidden);

}  // namespace icecache
