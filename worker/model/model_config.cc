#include "worker/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/limits.h"
#include "worker/model/file_bytes.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

// Reads typed keys of one object and keeps the first error, so that a parser reads as a list of
// keys.
class Reader {
 public:
  Reader(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  const Json* Find(const char* key) const {
    const auto it = json_.find(key);
    return it == json_.end() || it->is_null() ? nullptr : &*it;
  }
  uint32_t Count(const char* key, uint32_t max, std::optional<uint32_t> fallback = std::nullopt) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback ? *fallback : Missing(key, "a whole number");
    if (!value->is_number_unsigned() || value->get<uint64_t>() < 1 ||
        value->get<uint64_t>() > max) {
      return Fail(key, value, "a whole number in 1.." + std::to_string(max));
    }
    return value->get<uint32_t>();
  }
  double Number(const char* key, std::optional<double> fallback = std::nullopt) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback ? *fallback : Missing(key, "a number");
    if (!value->is_number() || !(value->get<double>() > 0) ||
        !std::isfinite(value->get<double>())) {
      return Fail(key, value, "a number above 0");
    }
    return value->get<double>();
  }
  bool Bool(const char* key, bool fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) return Fail(key, value, "true or false") != 0;
    return value->get<bool>();
  }
  std::string Text(const char* key, const std::string& fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) Fail(key, value, "a string");
    return value->is_string() ? value->get<std::string>() : fallback;
  }
  uint32_t Fail(const char* key, const Json* found, const std::string& expected) {
    if (status_.ok()) {
      status_ = InvalidArgument(where_ + ": '" + key + "' is " +
                                (found ? found->dump() : "missing") + ", expected " + expected);
    }
    return 0;
  }
  void Refuse(const char* key, const std::string& found, const std::string& why) {
    if (status_.ok()) status_ = Unimplemented(where_ + ": '" + key + "' is " + found + ": " + why);
  }
  const Status& status() const { return status_; }
  const std::string& where() const { return where_; }

 private:
  uint32_t Missing(const char* key, const std::string& expected) {
    return Fail(key, nullptr, expected);
  }

  const Json& json_;
  const std::string where_;
  Status status_;
};

struct FamilyName {
  ModelFamily family;
  std::string_view type;          // model_type
  std::string_view architecture;  // architectures[0]
};
constexpr FamilyName kFamilies[] = {
    {ModelFamily::kLlama, "llama", "LlamaForCausalLM"},
    {ModelFamily::kMistral, "mistral", "MistralForCausalLM"},
    {ModelFamily::kQwen2, "qwen2", "Qwen2ForCausalLM"},
    {ModelFamily::kQwen3, "qwen3", "Qwen3ForCausalLM"},
};

Result<ModelFamily> ParseFamily(const Reader& reader) {
  const Json* list = reader.Find("architectures");
  const Json* type = reader.Find("model_type");
  const Json* name = list != nullptr && list->is_array() && !list->empty() ? &(*list)[0] : type;
  const char* key = name != type ? "architectures" : "model_type";
  std::string known;
  for (const FamilyName& family : kFamilies) {
    const std::string_view expected = name != type ? family.architecture : family.type;
    if (name != nullptr && name->is_string() && name->get_ref<const std::string&>() == expected) {
      return family.family;
    }
    known += (known.empty() ? "" : ", ") + std::string(expected);
  }
  return Unimplemented(reader.where() + ": '" + key + "' is " + (name ? name->dump() : "missing") +
                       ", expected one of " + known);
}

double YarnScale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

void ParseYarn(Reader& reader, RopeScaling& scaling) {
  scaling.kind = RopeScaling::Kind::kYarn;
  scaling.beta_fast = reader.Number("beta_fast", 32);
  scaling.beta_slow = reader.Number("beta_slow", 1);
  scaling.truncate = reader.Bool("truncate", true);
  const bool both = reader.Find("mscale") != nullptr && reader.Find("mscale_all_dim") != nullptr;
  const double by_default = both ? YarnScale(scaling.factor, reader.Number("mscale")) /
                                       YarnScale(scaling.factor, reader.Number("mscale_all_dim"))
                                 : YarnScale(scaling.factor, 1);
  scaling.attention_factor = reader.Number("attention_factor", by_default);
}

// `json`: the rope_scaling object, or rope_parameters as transformers 5 writes it.
Result<RopeScaling> ParseRopeScaling(const Json& json, const std::string& where,
                                     uint32_t max_positions) {
  Reader reader(json, where);
  RopeScaling scaling;
  const std::string type = reader.Text("rope_type", reader.Text("type", "default"));
  if (type == "default") return scaling;
  if (type != "linear" && type != "llama3" && type != "yarn") {
    reader.Refuse(
        "rope_type", "'" + type + "'",
        "not known here, expected default, linear, llama3 or yarn (a type whose frequencies "
        "depend on the length read so far cannot serve cached keys)");
    return reader.status();
  }
  scaling.factor = reader.Number("factor");
  if (scaling.factor < 1) reader.Fail("factor", reader.Find("factor"), "at least 1");
  scaling.original_positions =
      reader.Count("original_max_position_embeddings", limits::kContextTokensMax, max_positions);
  if (type == "linear") {
    scaling.kind = RopeScaling::Kind::kLinear;
  } else if (type == "llama3") {
    scaling.kind = RopeScaling::Kind::kLlama3;
    scaling.low_freq_factor = reader.Number("low_freq_factor");
    scaling.high_freq_factor = reader.Number("high_freq_factor");
    if (scaling.high_freq_factor <= scaling.low_freq_factor) {
      reader.Fail("high_freq_factor", reader.Find("high_freq_factor"), "more than low_freq_factor");
    }
  } else {
    ParseYarn(reader, scaling);
  }
  if (!reader.status().ok()) return reader.status();
  return scaling;
}

Status ParseRope(Reader& reader, ModelConfig& config) {
  const Json* parameters = reader.Find("rope_parameters");
  const Json* scaling = reader.Find("rope_scaling");
  const char* key = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const Json* object = parameters != nullptr ? parameters : scaling;
  config.rope_theta = reader.Number("rope_theta", 10000.0);
  if (object == nullptr) return OkStatus();
  const std::string where = reader.where() + ": " + key;
  if (!object->is_object())
    return InvalidArgument(where + " is " + object->dump() + ", expected an object");
  Reader inner(*object, where);
  config.rope_theta = inner.Number("rope_theta", config.rope_theta);
  KV_RETURN_IF_ERROR(inner.status());
  KV_ASSIGN_OR_RETURN(config.rope_scaling, ParseRopeScaling(*object, where, config.max_positions));
  return OkStatus();
}

// What would change the mathematics and is not computed here.
void RefuseUnknown(Reader& reader, const ModelConfig& config) {
  const std::string act = reader.Text("hidden_act", "silu");
  if (act != "silu" && act != "swish")
    reader.Refuse("hidden_act", "'" + act + "'", "expected 'silu'");
  if (reader.Find("quantization_config") != nullptr) {
    reader.Refuse("quantization_config", "set", "only f32, f16 and bf16 weights can be read");
  }
  const Json* partial = reader.Find("partial_rotary_factor");
  if (partial != nullptr && *partial != 1.0) {
    reader.Refuse("partial_rotary_factor", partial->dump(),
                  "expected 1 (RoPE over the whole head)");
  }
  const std::string why =
      "attention is computed over all positions, so outputs would differ from the model's; use a "
      "model "
      "with full attention, or set the key to null to accept the difference";
  const Json* window = reader.Find("sliding_window");
  const bool qwen = config.family == ModelFamily::kQwen2 || config.family == ModelFamily::kQwen3;
  if (config.family == ModelFamily::kMistral && window != nullptr) {
    reader.Refuse("sliding_window", window->dump(), why);
  }
  if (qwen && window != nullptr && reader.Bool("use_sliding_window", false) &&
      reader.Count("max_window_layers", limits::kLayersMax, 1) < config.layers) {
    reader.Refuse("use_sliding_window", "true", why);
  }
  if (const Json* types = reader.Find("layer_types"); types != nullptr) {
    for (const Json& type : *types) {
      if (type != "full_attention") reader.Refuse("layer_types", type.dump(), why);
    }
  }
}

void AddIds(Reader& reader, const char* key, uint32_t vocab_size, std::vector<int32_t>& ids) {
  const Json* value = reader.Find(key);
  if (value == nullptr) return;
  const Json list = value->is_array() ? *value : Json::array({*value});
  for (const Json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= vocab_size) {
      reader.Fail(key, value, "token ids below " + std::to_string(vocab_size));
      return;
    }
    const auto token = id.get<int32_t>();
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  }
}

void ParseSizes(Reader& reader, ModelConfig& config) {
  config.layers = reader.Count("num_hidden_layers", limits::kLayersMax);
  config.hidden_size = reader.Count("hidden_size", 1u << 17);
  config.intermediate_size = reader.Count("intermediate_size", 1u << 20);
  config.query_heads = reader.Count("num_attention_heads", limits::kKvHeadsMax * limits::kGroupMax);
  config.kv_heads = reader.Count("num_key_value_heads", limits::kKvHeadsMax, config.query_heads);
  config.vocab_size = reader.Count("vocab_size", limits::kVocabMax);
  config.max_positions = reader.Count("max_position_embeddings", limits::kContextTokensMax, 2048);
  config.rms_norm_eps = reader.Number("rms_norm_eps", 1e-6);
  if (!reader.status().ok()) return;
  const bool divides = config.hidden_size % config.query_heads == 0;
  if (config.family == ModelFamily::kQwen3) {
    config.head_dim = reader.Count("head_dim", limits::kHeadDimMax, 128);
  } else if (reader.Find("head_dim") == nullptr && !divides) {
    reader.Fail("hidden_size", reader.Find("hidden_size"),
                "a multiple of num_attention_heads = " + std::to_string(config.query_heads) +
                    " where head_dim is not given");
  } else {
    config.head_dim =
        reader.Count("head_dim", limits::kHeadDimMax, config.hidden_size / config.query_heads);
  }
}

void ParseFlags(Reader& reader, ModelConfig& config) {
  const bool attention_bias = reader.Bool("attention_bias", false);
  config.tied_embeddings = reader.Bool("tie_word_embeddings", false);
  config.qk_norm = config.family == ModelFamily::kQwen3;
  switch (config.family) {
    case ModelFamily::kLlama:
      config.mlp_bias = reader.Bool("mlp_bias", false);
      [[fallthrough]];
    case ModelFamily::kQwen3:
      config.qkv_bias = attention_bias;
      config.output_bias = attention_bias;
      break;
    case ModelFamily::kQwen2:
      config.qkv_bias = true;  // by definition of the family, not by a key
      break;
    case ModelFamily::kMistral:
      break;
  }
}

Result<Json> ParseObject(std::string_view text, const std::string& where) {
  Json json = text.size() > limits::kJsonFileBytesMax
                  ? Json(nullptr)
                  : Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument(where + ": not a JSON object");
  return json;
}

}  // namespace

std::string_view ModelFamilyName(ModelFamily family) {
  return kFamilies[static_cast<size_t>(family)].type;
}

ModelShape ModelConfig::Shape(DType dtype) const {
  return {.layers = layers,
          .kv_heads = kv_heads,
          .query_heads = query_heads,
          .head_dim = head_dim,
          .dtype = dtype};
}

Result<ModelConfig> ParseModelConfig(std::string_view config_json, std::string_view generation_json,
                                     const std::string& where) {
  KV_ASSIGN_OR_RETURN(const Json json, ParseObject(config_json, where));
  Reader reader(json, where);
  ModelConfig config;
  KV_ASSIGN_OR_RETURN(config.family, ParseFamily(reader));
  ParseSizes(reader, config);
  KV_RETURN_IF_ERROR(reader.status());
  ParseFlags(reader, config);
  KV_RETURN_IF_ERROR(reader.status());
  KV_RETURN_IF_ERROR(ParseRope(reader, config));
  RefuseUnknown(reader, config);
  AddIds(reader, "bos_token_id", config.vocab_size, config.bos_ids);
  AddIds(reader, "eos_token_id", config.vocab_size, config.eos_ids);
  KV_RETURN_IF_ERROR(reader.status());
  KV_RETURN_IF_ERROR(config.Shape(DType::kF32).Validate().WithContext(where));
  if (generation_json.empty()) return config;
  const std::string generation_where = where + " (generation_config.json)";
  KV_ASSIGN_OR_RETURN(const Json generation, ParseObject(generation_json, generation_where));
  Reader generation_reader(generation, generation_where);
  AddIds(generation_reader, "eos_token_id", config.vocab_size, config.eos_ids);
  KV_RETURN_IF_ERROR(generation_reader.status());
  return config;
}

Result<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  const std::string generation_path = directory + "/generation_config.json";
  KV_ASSIGN_OR_RETURN(const auto file, FileBytes::Map(path));
  if (!FileExists(generation_path)) return ParseModelConfig(file->text(), {}, path);
  KV_ASSIGN_OR_RETURN(const auto generation, FileBytes::Map(generation_path));
  return ParseModelConfig(file->text(), generation->text(), path);
}

}  // namespace icecache
