#include "tests/models/tiny_model.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "common/status.h"

namespace icecache {
namespace {

double RoundTo(DType dtype, double x) {
  const auto f = static_cast<float>(x);
  switch (dtype) {
    case DType::kF16:
      return F16ToF32(F32ToF16(f));
    case DType::kBF16:
      return BF16ToF32(F32ToBF16(f));
    case DType::kF32:
      break;
  }
  return f;
}

class Filler {
 public:
  explicit Filler(TinyModel& model) : model_(model), random_(model.spec.seed) {}

  // Uniform around `center`, so that no value is special.
  void Add(const std::string& name, std::vector<uint64_t> shape, double center, double spread) {
    uint64_t count = 1;
    for (const uint64_t extent : shape) count *= extent;
    TinyTensor tensor{std::move(shape), std::vector<double>(count)};
    for (double& value : tensor.values) {
      const double unit = static_cast<double>(random_() >> 11) * 0x1.0p-53;
      value = RoundTo(model_.spec.dtype, center + spread * (2 * unit - 1));
    }
    model_.tensors.emplace(name, std::move(tensor));
  }
  void AddLinear(const std::string& name, uint64_t rows, uint64_t cols, bool bias) {
    Add(name + ".weight", {rows, cols}, 0, 2.0 / std::sqrt(static_cast<double>(cols)));
    if (bias) Add(name + ".bias", {rows}, 0, 0.5);
  }

 private:
  TinyModel& model_;
  std::mt19937_64 random_;
};

std::string Number(double x) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.17g", x);
  return text;
}

std::string ShapeJson(const std::vector<uint64_t>& shape) {
  std::string text;
  for (const uint64_t extent : shape) text += (text.empty() ? "" : ",") + std::to_string(extent);
  return "[" + text + "]";
}

void AppendValue(DType dtype, double value, std::string& data) {
  const auto f = static_cast<float>(value);
  const uint16_t half = dtype == DType::kF16 ? F32ToF16(f) : F32ToBF16(f);
  if (dtype == DType::kF32) {
    data.append(reinterpret_cast<const char*>(&f), sizeof(f));
  } else {
    data.append(reinterpret_cast<const char*>(&half), sizeof(half));
  }
}

}  // namespace

TinyModel MakeTinyModel(const TinySpec& spec) {
  TinyModel model{spec, {}};
  Filler fill(model);
  const uint64_t q_size = uint64_t{spec.query_heads} * spec.head_dim;
  const uint64_t kv_size = uint64_t{spec.kv_heads} * spec.head_dim;
  fill.Add("model.embed_tokens.weight", {spec.vocab, spec.hidden}, 0, 1.0);
  fill.Add("model.norm.weight", {spec.hidden}, 1, 0.4);
  if (!spec.tied) fill.AddLinear("lm_head", spec.vocab, spec.hidden, false);
  for (uint32_t layer = 0; layer < spec.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    fill.Add(prefix + "input_layernorm.weight", {spec.hidden}, 1, 0.4);
    fill.Add(prefix + "post_attention_layernorm.weight", {spec.hidden}, 1, 0.4);
    fill.AddLinear(prefix + "self_attn.q_proj", q_size, spec.hidden, spec.has_qkv_bias());
    fill.AddLinear(prefix + "self_attn.k_proj", kv_size, spec.hidden, spec.has_qkv_bias());
    fill.AddLinear(prefix + "self_attn.v_proj", kv_size, spec.hidden, spec.has_qkv_bias());
    fill.AddLinear(prefix + "self_attn.o_proj", spec.hidden, q_size, spec.attention_bias);
    if (spec.has_qk_norm()) {
      fill.Add(prefix + "self_attn.q_norm.weight", {spec.head_dim}, 1, 0.4);
      fill.Add(prefix + "self_attn.k_norm.weight", {spec.head_dim}, 1, 0.4);
    }
    fill.AddLinear(prefix + "mlp.gate_proj", spec.inner, spec.hidden, spec.mlp_bias);
    fill.AddLinear(prefix + "mlp.up_proj", spec.inner, spec.hidden, spec.mlp_bias);
    fill.AddLinear(prefix + "mlp.down_proj", spec.hidden, spec.inner, spec.mlp_bias);
  }
  return model;
}

std::string TinyConfigJson(const TinySpec& spec) {
  const auto flag = [](bool b) { return std::string(b ? "true" : "false"); };
  const std::map<std::string, std::string> types = {{"LlamaForCausalLM", "llama"},
                                                    {"MistralForCausalLM", "mistral"},
                                                    {"Qwen2ForCausalLM", "qwen2"},
                                                    {"Qwen3ForCausalLM", "qwen3"}};
  const auto type = types.find(spec.architecture);
  return "{\"architectures\": [\"" + spec.architecture + "\"], \"model_type\": \"" +
         (type == types.end() ? "other" : type->second) + "\", \"hidden_act\": \"silu\"" +
         ", \"num_hidden_layers\": " + std::to_string(spec.layers) +
         ", \"hidden_size\": " + std::to_string(spec.hidden) +
         ", \"intermediate_size\": " + std::to_string(spec.inner) +
         ", \"num_attention_heads\": " + std::to_string(spec.query_heads) +
         ", \"num_key_value_heads\": " + std::to_string(spec.kv_heads) +
         ", \"head_dim\": " + std::to_string(spec.head_dim) +
         ", \"vocab_size\": " + std::to_string(spec.vocab) +
         ", \"max_position_embeddings\": " + std::to_string(spec.max_positions) +
         ", \"rms_norm_eps\": " + Number(spec.eps) +
         ", \"rope_theta\": " + Number(spec.rope_theta) +
         ", \"rope_scaling\": " + spec.rope_scaling +
         ", \"tie_word_embeddings\": " + flag(spec.tied) +
         ", \"attention_bias\": " + flag(spec.attention_bias) +
         ", \"mlp_bias\": " + flag(spec.mlp_bias) +
         ", \"bos_token_id\": 1, \"eos_token_id\": [2, 3]}\n";
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  KV_CHECK(file.good());
}

void WriteSafetensors(const std::string& path, const std::map<std::string, TinyTensor>& tensors,
                      DType dtype) {
  const std::string name = dtype == DType::kF32 ? "F32" : dtype == DType::kF16 ? "F16" : "BF16";
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::string data;
  for (const auto& [tensor_name, tensor] : tensors) {
    const size_t begin = data.size();
    for (const double value : tensor.values) AppendValue(dtype, value, data);
    header += ",\"" + tensor_name + "\":{\"dtype\":\"" + name +
              "\",\"shape\":" + ShapeJson(tensor.shape) + ",\"data_offsets\":[" +
              std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
  }
  header += "}";
  const uint64_t header_bytes = header.size();
  WriteText(path, std::string(reinterpret_cast<const char*>(&header_bytes), 8) + header + data);
}

void WriteTinyModel(const TinyModel& model, const std::string& directory) {
  WriteText(directory + "/config.json", TinyConfigJson(model.spec));
  if (model.spec.shards == 1) {
    WriteSafetensors(directory + "/model.safetensors", model.tensors, model.spec.dtype);
    return;
  }
  std::vector<std::map<std::string, TinyTensor>> shards(model.spec.shards);
  std::string map;
  size_t index = 0;
  for (const auto& [name, tensor] : model.tensors) {  // neighbours land in different files
    const size_t shard = index++ % shards.size();
    shards[shard].emplace(name, tensor);
    map += (map.empty() ? "\"" : ", \"") + name + "\": \"shard-" + std::to_string(shard) +
           ".safetensors\"";
  }
  for (size_t shard = 0; shard < shards.size(); ++shard) {
    WriteSafetensors(directory + "/shard-" + std::to_string(shard) + ".safetensors", shards[shard],
                     model.spec.dtype);
  }
  WriteText(directory + "/model.safetensors.index.json",
            "{\"metadata\": {}, \"weight_map\": {" + map + "}}");
}

TempDirectory::TempDirectory() {
  path_ = (std::filesystem::temp_directory_path() / "icecache-test-XXXXXX").string();
  KV_CHECK(mkdtemp(path_.data()) != nullptr);
}

TempDirectory::~TempDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace icecache
