// ModelConfig: a Hugging Face config.json as checked numbers, one struct for all supported
// families.
//
// Families: Llama, Mistral, Qwen2 (and 2.5), Qwen3. They differ in biases, in the RMSNorm of q and
// k, in how head_dim is given and in RoPE scaling; everything else is one architecture. What a
// family can say that this code cannot honour (sliding windows, quantised weights, other
// activations) is refused with the key's name, never ignored. Values; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/model_shape.h"
#include "common/status.h"

namespace icecache {

enum class ModelFamily : uint8_t { kLlama, kMistral, kQwen2, kQwen3 };
std::string_view ModelFamilyName(ModelFamily family);  // "llama" | "mistral" | "qwen2" | "qwen3"

// How the RoPE frequencies are stretched beyond the training length. Source of the formulas: the
// papers (linear: position interpolation; yarn: arXiv 2309.00071; llama3: the Llama 3.1 release).
struct RopeScaling {
  enum class Kind : uint8_t { kNone, kLinear, kLlama3, kYarn };
  Kind kind = Kind::kNone;
  double factor = 1;
  double original_positions = 0;  // llama3, yarn: the length before scaling
  double low_freq_factor = 1;     // llama3
  double high_freq_factor = 4;    // llama3
  double beta_fast = 32;          // yarn
  double beta_slow = 1;           // yarn
  bool truncate = true;           // yarn: whole dimensions as borders of the ramp
  double attention_factor = 1;    // yarn: multiplies cos and sin
};

struct ModelConfig {
  ModelFamily family = ModelFamily::kLlama;
  uint32_t layers = 0;
  uint32_t hidden_size = 0;
  uint32_t intermediate_size = 0;
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t vocab_size = 0;
  uint32_t max_positions = 0;  // what the model was trained or scaled for
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool tied_embeddings = false;  // the output matrix is the embedding
  bool qkv_bias = false;
  bool output_bias = false;  // of the attention's output projection
  bool mlp_bias = false;
  bool qk_norm = false;          // RMSNorm over head_dim of each q and k head, before RoPE
  std::vector<int32_t> bos_ids;  // 0 or 1
  std::vector<int32_t> eos_ids;  // any number; config.json and generation_config.json together

  // The KV layout, with `dtype` chosen by the caller.
  ModelShape Shape(DType dtype) const;
};

// `where` names the file in errors. INVALID_ARGUMENT: bad JSON or value; UNIMPLEMENTED: a model
// this code does not know. `generation_json` may be empty.
Result<ModelConfig> ParseModelConfig(std::string_view config_json, std::string_view generation_json,
                                     const std::string& where);

// Reads directory/config.json and, where it exists, directory/generation_config.json.
Result<ModelConfig> LoadModelConfig(const std::string& directory);

}  // namespace icecache
