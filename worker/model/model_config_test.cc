// config.json of the families, as published, and what is refused in it.
#include "worker/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/models/tiny_model.h"
#include "worker/model/rope.h"

namespace icecache {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

Json Base(const std::string& architecture) {
  TinySpec spec;
  spec.architecture = architecture;
  return Json::parse(TinyConfigJson(spec));
}

Result<ModelConfig> Parse(const Json& json) {
  return ParseModelConfig(json.dump(), {}, "dir/config.json");
}

Status ErrorOf(const Json& json) {
  const auto config = Parse(json);
  return config.ok() ? OkStatus() : config.status();
}

TEST(ModelConfig, Llama31AsPublished) {
  const auto config = ParseModelConfig(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256})",
                                       R"({"eos_token_id": [128009, 7]})", "x");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->family, ModelFamily::kLlama);
  EXPECT_EQ(config->Shape(DType::kBF16), (ModelShape{32, 8, 32, 128, DType::kBF16}));
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(config->rope_scaling.original_positions, 8192);
  EXPECT_EQ(config->max_positions, 131072u);
  EXPECT_EQ(config->intermediate_size, 14336u);
  EXPECT_FALSE(config->tied_embeddings || config->qkv_bias || config->qk_norm);
  EXPECT_THAT(config->bos_ids, ElementsAre(128000));
  EXPECT_THAT(config->eos_ids, ElementsAre(128001, 128008, 128009, 7));
}

TEST(ModelConfig, Qwen25HasBiasesAndItsUnusedWindowIsNoObstacle) {
  Json json = Base("Qwen2ForCausalLM");
  json.erase("head_dim");
  json["sliding_window"] = 131072;
  json["use_sliding_window"] = false;
  json["max_window_layers"] = 1;
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_TRUE(config->qkv_bias);
  EXPECT_FALSE(config->output_bias);
  EXPECT_EQ(config->head_dim, 16u);
  json["use_sliding_window"] = true;
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("'use_sliding_window' is true"));
}

TEST(ModelConfig, Qwen3HasHeadNormsAndItsOwnHeadDim) {
  Json json = Base("Qwen3ForCausalLM");
  json.erase("head_dim");
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_TRUE(config->qk_norm);
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_EQ(config->head_dim, 128u);
}

TEST(ModelConfig, MistralWindowIsRefusedWithTheWayOut) {
  Json json = Base("MistralForCausalLM");
  json["sliding_window"] = nullptr;
  EXPECT_TRUE(Parse(json).ok());
  json["sliding_window"] = 4096;
  const Status status = ErrorOf(json);
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("dir/config.json: 'sliding_window' is 4096"));
  EXPECT_THAT(status.message(), HasSubstr("set the key to null"));
}

TEST(ModelConfig, UnknownArchitectureNamesWhatIsKnown) {
  for (const char* name :
       {"GPT2LMHeadModel", "LlamaForSequenceClassification", "MixtralForCausalLM"}) {
    const Status status = ErrorOf(Base(name));
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
    EXPECT_THAT(status.message(), HasSubstr(std::string("'architectures' is \"") + name));
    EXPECT_THAT(status.message(), HasSubstr("MistralForCausalLM"));
  }
  Json json = Base("LlamaForCausalLM");
  json.erase("architectures");
  json.erase("model_type");
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("'model_type' is missing"));
  json["model_type"] = "llama";
  EXPECT_TRUE(Parse(json).ok());
}

TEST(ModelConfig, EveryBadKeyIsNamed) {
  const std::pair<const char*, Json> bad[] = {
      {"num_hidden_layers", 0},
      {"num_hidden_layers", 100000},
      {"hidden_size", "64"},
      {"hidden_size", -64},
      {"num_attention_heads", 2.5},
      {"num_key_value_heads", 0},
      {"vocab_size", 1ull << 40},
      {"head_dim", 4096},
      {"rms_norm_eps", 0},
      {"rms_norm_eps", "small"},
      {"rope_theta", -1},
      {"tie_word_embeddings", "yes"},
      {"attention_bias", 1},
      {"hidden_act", "gelu"},
      {"partial_rotary_factor", 0.5},
      {"quantization_config", Json::object()},
      {"eos_token_id", 101},
      {"bos_token_id", "a"},
      {"rope_scaling", 8},
      {"layer_types", {"full_attention", "sliding_attention"}}};
  for (const auto& [key, value] : bad) {
    Json json = Base("LlamaForCausalLM");
    json[key] = value;
    const Status status = ErrorOf(json);
    EXPECT_FALSE(status.ok()) << key << " = " << value;
    EXPECT_THAT(status.message(), HasSubstr(key));
    EXPECT_THAT(status.message(), HasSubstr("dir/config.json"));
  }
  for (const char* key : {"num_hidden_layers", "hidden_size", "intermediate_size",
                          "num_attention_heads", "vocab_size"}) {
    Json json = Base("LlamaForCausalLM");
    json.erase(key);
    EXPECT_THAT(ErrorOf(json).message(), HasSubstr("'" + std::string(key) + "' is missing"));
  }
}

TEST(ModelConfig, HeadsThatDoNotDivideAreRefused) {
  Json json = Base("LlamaForCausalLM");
  json["num_key_value_heads"] = 3;
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("4 query heads over 3 kv heads"));
  json = Base("LlamaForCausalLM");
  json["head_dim"] = 24;
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("multiple of 16"));
  json.erase("head_dim");
  json["hidden_size"] = 66;
  EXPECT_THAT(ErrorOf(json).message(),
              HasSubstr("'hidden_size' is 66, expected a multiple of num_attention_heads"));
}

TEST(ModelConfig, RopeTypesThatDependOnTheLengthAreRefused) {
  for (const char* type : {"dynamic", "longrope", "su"}) {
    Json json = Base("LlamaForCausalLM");
    json["rope_scaling"] = {{"type", type}, {"factor", 2}};
    EXPECT_THAT(ErrorOf(json).message(),
                HasSubstr("rope_scaling: 'rope_type' is '" + std::string(type) + "'"));
  }
  Json json = Base("LlamaForCausalLM");
  json["rope_scaling"] = {
      {"rope_type", "llama3"}, {"factor", 2}, {"low_freq_factor", 4}, {"high_freq_factor", 4}};
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("high_freq_factor"));
  json["rope_scaling"] = {{"rope_type", "linear"}};
  EXPECT_THAT(ErrorOf(json).message(), HasSubstr("'factor' is missing"));
}

TEST(ModelConfig, RopeParametersOfNewerFilesAreRead) {
  Json json = Base("LlamaForCausalLM");
  json.erase("rope_theta");
  json.erase("rope_scaling");
  json["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 250000}, {"factor", 2}};
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->rope_theta, 250000);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kLinear);
}

TEST(ModelConfig, BadJsonIsRefused) {
  EXPECT_THAT(ParseModelConfig("{\"a\": ", {}, "x").status().message(),
              HasSubstr("x: not a JSON object"));
  EXPECT_THAT(ParseModelConfig("[]", {}, "x").status().message(),
              HasSubstr("x: not a JSON object"));
  EXPECT_THAT(ParseModelConfig(Base("LlamaForCausalLM").dump(), "nonsense", "x").status().message(),
              HasSubstr("generation_config.json"));
}

TEST(Rope, FrequenciesAtTheBordersOfTheScalings) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000;
  config.rope_scaling = {
      .kind = RopeScaling::Kind::kLlama3, .factor = 8, .original_positions = 8192};
  const auto scaled = RopeFrequencies(config);
  EXPECT_DOUBLE_EQ(scaled[0], 1.0);  // 1,304 turns in 8,192 positions: kept
  EXPECT_DOUBLE_EQ(scaled[63],
                   std::pow(500000.0, -126.0 / 128) / 8);  // less than one turn: stretched
  // Pair 32: frequency 500000^-0.5 = 0.0014142, 1.844 turns, (1.844 - 1) / 3 of the way.
  const double plain = std::pow(500000.0, -0.5);
  const double keep = (8192 * plain / (2 * M_PI) - 1) / 3;
  EXPECT_NEAR(scaled[32], plain * (keep + (1 - keep) / 8), 1e-15);

  config.rope_theta = 10000;
  config.rope_scaling = {.kind = RopeScaling::Kind::kYarn, .factor = 4, .original_positions = 2048};
  const auto yarn = RopeFrequencies(config);
  // Borders: 64 ln(2048 / (2 pi 32)) / ln(10000) = 16.1, 64 ln(2048 / 2 pi) / ln(10000) = 40.2.
  EXPECT_DOUBLE_EQ(yarn[16], std::pow(10000.0, -32.0 / 128));
  EXPECT_DOUBLE_EQ(yarn[41], std::pow(10000.0, -82.0 / 128) / 4);
  EXPECT_NEAR(yarn[28], std::pow(10000.0, -56.0 / 128) * (1 - 12.0 / 25 * 0.75), 1e-15);
}

TEST(Rope, TurnsPairsByPositionTimesFrequency) {
  ModelConfig config;
  config.head_dim = 16;
  config.rope_theta = 100;
  Rope rope(config);
  rope.Prepare(1000000, 3);
  std::vector<float> x(32, 0.0f);
  x[1] = 3, x[16 + 2 + 8] = 2;  // head 0 pair 1 low; head 1 pair 2 high
  rope.Apply(x.data(), 2, 2, 0.5f);
  const double one = 1000002.0 * std::pow(100.0, -1.0 / 8),
               two = 1000002.0 * std::pow(100.0, -2.0 / 8);
  EXPECT_NEAR(x[1], 1.5 * std::cos(one), 1e-6);
  EXPECT_NEAR(x[9], 1.5 * std::sin(one), 1e-6);
  EXPECT_NEAR(x[18], -1.0 * std::sin(two), 1e-6);
  EXPECT_NEAR(x[26], 1.0 * std::cos(two), 1e-6);
}

}  // namespace
}  // namespace icecache
