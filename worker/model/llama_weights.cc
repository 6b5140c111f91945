#include "worker/model/llama_weights.h"

#include <cstdio>
#include <filesystem>
#include <utility>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "worker/model/file_bytes.h"

namespace icecache {
namespace {

class Loader {
 public:
  explicit Loader(LlamaWeights& weights) : weights_(weights), config_(weights.config) {}
  Status Load();

 private:
  Status LoadVector(const std::string& name, uint32_t count, std::vector<float>& to);
  Status LoadMatrix(const std::string& name, uint32_t rows, uint32_t cols, WeightMatrix& to);
  Status LoadLinear(const std::string& name, uint32_t rows, uint32_t cols, bool bias, Linear& to);
  Status LoadLayer(uint32_t index, LayerWeights& to);

  LlamaWeights& weights_;
  const ModelConfig& config_;
};

Status Loader::LoadVector(const std::string& name, uint32_t count, std::vector<float>& to) {
  KV_ASSIGN_OR_RETURN(const TensorView tensor, weights_.files->Find(name, {count}));
  to.resize(count);
  ToF32(tensor.data, tensor.dtype, count, to.data());
  return OkStatus();
}

Status Loader::LoadMatrix(const std::string& name, uint32_t rows, uint32_t cols, WeightMatrix& to) {
  KV_ASSIGN_OR_RETURN(const TensorView tensor, weights_.files->Find(name, {rows, cols}));
  to = {tensor.data, tensor.dtype, rows, cols};
  return OkStatus();
}

Status Loader::LoadLinear(const std::string& name, uint32_t rows, uint32_t cols, bool bias,
                          Linear& to) {
  KV_RETURN_IF_ERROR(LoadMatrix(name + ".weight", rows, cols, to.weight));
  return bias ? LoadVector(name + ".bias", rows, to.bias) : OkStatus();
}

Status Loader::LoadLayer(uint32_t index, LayerWeights& to) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const std::string attention = prefix + "self_attn.";
  const std::string mlp = prefix + "mlp.";
  const uint32_t hidden = config_.hidden_size;
  const uint32_t inner = config_.intermediate_size;
  const uint32_t q_size = config_.query_heads * config_.head_dim;
  const uint32_t kv_size = config_.kv_heads * config_.head_dim;
  KV_RETURN_IF_ERROR(LoadVector(prefix + "input_layernorm.weight", hidden, to.input_norm));
  KV_RETURN_IF_ERROR(LoadVector(prefix + "post_attention_layernorm.weight", hidden, to.post_norm));
  KV_RETURN_IF_ERROR(LoadLinear(attention + "q_proj", q_size, hidden, config_.qkv_bias, to.q));
  KV_RETURN_IF_ERROR(LoadLinear(attention + "k_proj", kv_size, hidden, config_.qkv_bias, to.k));
  KV_RETURN_IF_ERROR(LoadLinear(attention + "v_proj", kv_size, hidden, config_.qkv_bias, to.v));
  KV_RETURN_IF_ERROR(LoadLinear(attention + "o_proj", hidden, q_size, config_.output_bias, to.o));
  if (config_.qk_norm) {
    KV_RETURN_IF_ERROR(LoadVector(attention + "q_norm.weight", config_.head_dim, to.q_norm));
    KV_RETURN_IF_ERROR(LoadVector(attention + "k_norm.weight", config_.head_dim, to.k_norm));
  }
  KV_RETURN_IF_ERROR(LoadLinear(mlp + "gate_proj", inner, hidden, config_.mlp_bias, to.gate));
  KV_RETURN_IF_ERROR(LoadLinear(mlp + "up_proj", inner, hidden, config_.mlp_bias, to.up));
  return LoadLinear(mlp + "down_proj", hidden, inner, config_.mlp_bias, to.down);
}

Status Loader::Load() {
  const uint32_t hidden = config_.hidden_size;
  KV_RETURN_IF_ERROR(
      LoadMatrix("model.embed_tokens.weight", config_.vocab_size, hidden, weights_.embedding));
  KV_RETURN_IF_ERROR(LoadVector("model.norm.weight", hidden, weights_.final_norm));
  weights_.layers.resize(config_.layers);
  for (uint32_t i = 0; i < config_.layers; ++i) {
    KV_RETURN_IF_ERROR(LoadLayer(i, weights_.layers[i]));
  }
  weights_.output = weights_.embedding;
  return config_.tied_embeddings
             ? OkStatus()
             : LoadMatrix("lm_head.weight", config_.vocab_size, hidden, weights_.output);
}

std::string IdentityOf(const LlamaWeights& weights, uint64_t config_hash) {
  const uint64_t seeds[] = {config_hash, weights.files->Fingerprint()};
  char hash[17];
  std::snprintf(hash, sizeof(hash), "%016llx",
                static_cast<unsigned long long>(Checksum64(std::as_bytes(std::span(seeds)))));
  std::filesystem::path path = std::filesystem::path(weights.files->directory()).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // "models/recall/"
  return std::string(ModelFamilyName(weights.config.family)) + ":" + path.filename().string() +
         ":" + hash;
}

}  // namespace

Result<LlamaWeights> LoadLlamaWeights(const std::string& directory) {
  LlamaWeights weights;
  KV_ASSIGN_OR_RETURN(weights.config, LoadModelConfig(directory));
  KV_ASSIGN_OR_RETURN(const auto config_file, FileBytes::Map(directory + "/config.json"));
  KV_ASSIGN_OR_RETURN(weights.files, WeightFiles::Open(directory));
  KV_RETURN_IF_ERROR(Loader(weights).Load());
  weights.identity = IdentityOf(weights, Checksum64(config_file->bytes()));
  return weights;
}

Status EmbedTokens(const LlamaWeights& weights, std::span<const int32_t> tokens, float* hidden) {
  const ModelConfig& config = weights.config;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || static_cast<uint32_t>(tokens[i]) >= config.vocab_size) {
      return InvalidArgument("token " + std::to_string(i) + " has id " + std::to_string(tokens[i]) +
                             ", expected 0.." + std::to_string(config.vocab_size - 1) +
                             "; do tokenizer.json and model belong together?");
    }
    ToF32(weights.embedding.row(static_cast<size_t>(tokens[i])), weights.embedding.dtype,
          config.hidden_size, hidden + i * config.hidden_size);
  }
  return OkStatus();
}

}  // namespace icecache
