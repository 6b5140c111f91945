// Logits of every family against the float64 reference in tests/models, and what LoadModel refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "tests/models/dense_attention.h"
#include "tests/models/reference_model.h"
#include "tests/models/tiny_model.h"
#include "worker/model/model.h"
#include "worker/model/step_attention.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

struct Case {
  std::string name;
  TinySpec spec;
  ReferenceScaling scaling;
  uint32_t first = 0;  // position of the first token
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

TinySpec Spec(const std::string& architecture, DType dtype, uint64_t seed) {
  TinySpec spec;
  spec.architecture = architecture;
  spec.dtype = dtype;
  spec.seed = seed;
  return spec;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, TinySpec spec, ReferenceScaling scaling = {},
                       uint32_t first = 0) {
    cases.push_back({name, std::move(spec), scaling, first});
  };
  add("LlamaF32", Spec("LlamaForCausalLM", DType::kF32, 1));
  add("LlamaF16", Spec("LlamaForCausalLM", DType::kF16, 2));
  add("LlamaBF16", Spec("LlamaForCausalLM", DType::kBF16, 3));
  TinySpec spec = Spec("LlamaForCausalLM", DType::kF16, 4);
  spec.tied = true;
  add("LlamaTied", spec);
  spec = Spec("LlamaForCausalLM", DType::kBF16, 5);
  spec.shards = 3;
  add("LlamaSharded", spec);
  spec = Spec("LlamaForCausalLM", DType::kF32, 6);
  spec.attention_bias = spec.mlp_bias = true;
  add("LlamaAllBiases", spec);
  spec = Spec("LlamaForCausalLM", DType::kF32, 7);
  spec.hidden = 48, spec.inner = 72, spec.query_heads = 5, spec.kv_heads = 1, spec.head_dim = 16,
  spec.vocab = 37;
  add("LlamaOddSizesOneKvHead", spec);
  spec = Spec("LlamaForCausalLM", DType::kF16, 8);
  spec.hidden = 44, spec.inner = 50;  // no whole vectors
  add("LlamaWidthsThatAreNoMultipleOf16", spec);
  spec = Spec("LlamaForCausalLM", DType::kF32, 9);
  spec.rope_theta = 500000, spec.max_positions = 131072;
  spec.rope_scaling = R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})";
  add("LlamaLlama3Rope", spec, {ReferenceScaling::Kind::kLlama3, 8, 8192, 1, 4}, 60000);
  spec = Spec("LlamaForCausalLM", DType::kF32, 10);
  spec.rope_scaling = R"({"type": "linear", "factor": 4})";
  add("LlamaLinearRope", spec, {ReferenceScaling::Kind::kLinear, 4}, 5000);
  add("MistralBF16", Spec("MistralForCausalLM", DType::kBF16, 11));
  add("MistralF16", Spec("MistralForCausalLM", DType::kF16, 12));
  add("Qwen2BF16", Spec("Qwen2ForCausalLM", DType::kBF16, 13));
  spec = Spec("Qwen2ForCausalLM", DType::kF32, 14);
  spec.tied = true, spec.rope_theta = 1e6;
  spec.rope_scaling =
      R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048})";
  add("Qwen2TiedYarnRope", spec, {ReferenceScaling::Kind::kYarn, 4, 2048}, 7000);
  add("Qwen3F16", Spec("Qwen3ForCausalLM", DType::kF16, 15));
  spec = Spec("Qwen3ForCausalLM", DType::kBF16, 16);
  spec.hidden = 80, spec.query_heads = 6, spec.kv_heads = 3, spec.head_dim = 64, spec.tied = true,
  spec.shards = 2;
  add("Qwen3WideHeadsShardedTied", spec);
  return cases;
}

std::vector<int32_t> Tokens(const TinySpec& spec, size_t count) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<int32_t>((i * 37 + 11) % spec.vocab));
  return tokens;
}

// For tests/models/hf_reference.py: the model, what it was asked and what the reference answered.
void KeepForHuggingFace(const Case& c, const TinyModel& tiny, const std::vector<int32_t>& tokens,
                        const std::vector<double>& last) {
  const char* root = std::getenv("ICECACHE_KEEP_TINY_MODELS");
  if (root == nullptr) return;
  const std::string directory = std::string(root) + "/" + c.name;
  std::filesystem::create_directories(directory);
  WriteTinyModel(tiny, directory);
  std::string ids, logits;
  for (const int32_t id : tokens) ids += (ids.empty() ? "" : ",") + std::to_string(id);
  for (const double logit : last) logits += (logits.empty() ? "" : ",") + std::to_string(logit);
  WriteText(directory + "/tokens.json",
            "{\"first\": " + std::to_string(c.first) + ", \"tokens\": [" + ids + "]}\n");
  WriteText(directory + "/logits.json", "[" + logits + "]\n");
}

class LlamaModelLogits : public ::testing::TestWithParam<Case> {};

// The worker promises 1e-3; f32 against float64 stays well below.
constexpr double kTolerance = 2e-4;

TEST_P(LlamaModelLogits, EqualTheReference) {
  const Case& c = GetParam();
  const TinyModel tiny = MakeTinyModel(c.spec);
  TempDirectory directory;
  WriteTinyModel(tiny, directory.path());
  const std::vector<int32_t> tokens = Tokens(c.spec, 90);
  const auto expected = ReferenceLogits(tiny, c.scaling, tokens, c.first);

  KeepForHuggingFace(c, tiny, tokens, expected.back());
  auto model = LoadModel(directory.path(), {DType::kF32, 2});
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  DenseAttention attention((*model)->shape(), 2);
  // A long block, a short one and single tokens: every path of the products.
  double worst = 0;
  size_t at = 0;
  for (const size_t block : {80, 6, 1, 1, 2}) {
    const auto logits = RunBlock(**model, attention, std::span(tokens).subspan(at, block),
                                 c.first + static_cast<uint32_t>(at));
    ASSERT_TRUE(logits.ok()) << logits.status().ToString();
    for (size_t i = 0; i < block; ++i) {
      for (size_t j = 0; j < c.spec.vocab; ++j) {
        worst = std::max(worst, std::fabs((*logits)[i][j] - expected[at + i][j]));
      }
    }
    at += block;
  }
  EXPECT_LT(worst, kTolerance);
  RecordProperty("worst", std::to_string(worst));
  double spread = 0;
  for (const double logit : expected.back()) spread = std::max(spread, std::fabs(logit));
  EXPECT_GT(spread, 0.5) << "logits too small for the comparison to mean anything";
}

INSTANTIATE_TEST_SUITE_P(Families, LlamaModelLogits, ::testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

// Not by rounding, either: the same products in the same order, whatever the company.
TEST(LlamaModel, ARowOfAStepDoesNotDependOnTheOthers) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const TempDirectory directory;
    TinySpec spec = Spec("Qwen2ForCausalLM", dtype, 41);
    spec.hidden = 64, spec.inner = 96;
    WriteTinyModel(MakeTinyModel(spec), directory.path());
    const auto model = LoadModel(directory.path(), {});
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    Model& m = **model;
    const auto run = [&](const std::vector<uint32_t>& sequences) {
      std::vector<std::unique_ptr<DenseAttention>> attentions;
      std::vector<LayerAttention*> rows;
      for (size_t i = 0; i < sequences.size(); ++i) {
        attentions.push_back(std::make_unique<DenseAttention>(m.shape()));
        rows.push_back(attentions.back().get());
      }
      EachSequence attention(m.shape(), rows, false);
      std::vector<std::vector<float>> logits(sequences.size(), std::vector<float>(m.vocab_size()));
      for (uint32_t step = 0; step < 3; ++step) {
        std::vector<StepToken> tokens;
        for (const uint32_t s : sequences) {
          tokens.push_back(
              {static_cast<int32_t>((5 * s + step) % m.vocab_size()), TokenPos(100 * s + step)});
        }
        EXPECT_TRUE(m.Step(tokens, attention).ok());
      }
      for (uint32_t i = 0; i < sequences.size(); ++i) {
        EXPECT_TRUE(m.StepLogits(i, logits[i].data()).ok());
      }
      return logits;
    };
    std::vector<uint32_t> all(16);
    for (uint32_t s = 0; s < 16; ++s) all[s] = s;
    const auto together = run(all);
    for (const uint32_t s : {0u, 7u, 15u}) EXPECT_EQ(run({s})[0], together[s]) << "row " << s;
  }
}

TEST(LlamaModel, ScalingChangesTheLogits) {
  TinySpec spec = Spec("LlamaForCausalLM", DType::kF32, 9);
  const TinyModel tiny = MakeTinyModel(spec);
  const auto tokens = Tokens(spec, 8);
  const auto plain = ReferenceLogits(tiny, {}, tokens, 3000);
  for (const auto kind : {ReferenceScaling::Kind::kLinear, ReferenceScaling::Kind::kLlama3,
                          ReferenceScaling::Kind::kYarn}) {
    const auto scaled = ReferenceLogits(tiny, {kind, 8, 1024}, tokens, 3000);
    double difference = 0;
    for (size_t j = 0; j < spec.vocab; ++j) {
      difference = std::max(difference, std::fabs(scaled.back()[j] - plain.back()[j]));
    }
    EXPECT_GT(difference, 50 * kTolerance);
  }
}

TEST(LlamaModel, ShapeAndIdentityComeFromTheFiles) {
  TempDirectory a, b, c;
  TinySpec spec;
  WriteTinyModel(MakeTinyModel(spec), a.path());
  WriteTinyModel(MakeTinyModel(spec), b.path());
  spec.seed = 77;  // a fine-tune: equal config and header, other weights
  WriteTinyModel(MakeTinyModel(spec), c.path());
  const auto identity = [](const TempDirectory& d) {
    auto model = LoadModel(d.path() + "/", {DType::kBF16, 1});
    EXPECT_TRUE(model.ok());
    EXPECT_EQ((*model)->shape(), (ModelShape{2, 2, 4, 32, DType::kBF16}));
    EXPECT_EQ((*model)->vocab_size(), 101u);
    EXPECT_EQ((*model)->hidden_size(), 64u);
    const std::string name = (*model)->identity();
    EXPECT_THAT(name,
                HasSubstr("llama:" + std::filesystem::path(d.path()).filename().string() + ":"));
    return name.substr(name.rfind(':'));
  };
  EXPECT_EQ(identity(a), identity(b));
  EXPECT_NE(identity(a), identity(c));
}

TEST(LlamaModel, TokenOutsideTheVocabularyIsRefused) {
  TempDirectory directory;
  WriteTinyModel(MakeTinyModel({}), directory.path());
  auto model = LoadModel(directory.path(), {});
  ASSERT_TRUE(model.ok());
  std::vector<float> hidden((*model)->hidden_size());
  for (const int32_t id : {-1, 101}) {
    const Status status = (*model)->Embed({&id, 1}, hidden.data());
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("id " + std::to_string(id) + ", expected 0..100"));
  }
}

class FailingAttention final : public LayerAttention {
 public:
  Status Attend(LayerId, TokenPos, uint32_t, const float*, const float*, const float*,
                float*) override {
    return Unavailable("server gone");
  }
};

TEST(LlamaModel, AttentionErrorEndsTheLayer) {
  TempDirectory directory;
  WriteTinyModel(MakeTinyModel({}), directory.path());
  auto model = LoadModel(directory.path(), {});
  ASSERT_TRUE(model.ok());
  std::vector<float> hidden((*model)->hidden_size());
  FailingAttention attention;
  EXPECT_EQ((*model)->Layer(LayerId(0), TokenPos(0), 1, hidden.data(), attention).code(),
            StatusCode::kUnavailable);
}

Status LoadStatus(const TempDirectory& directory) {
  const auto model = LoadModel(directory.path(), {});
  return model.ok() ? OkStatus() : model.status();
}

TEST(LlamaModel, MissingTensorIsNamed) {
  TinyModel tiny = MakeTinyModel({});
  TempDirectory directory;
  tiny.tensors.erase("model.layers.1.mlp.up_proj.weight");
  WriteTinyModel(tiny, directory.path());
  const Status status = LoadStatus(directory);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("no tensor 'model.layers.1.mlp.up_proj.weight'"));
  EXPECT_THAT(status.message(), HasSubstr("[96, 64]"));
}

TEST(LlamaModel, UntiedModelNeedsItsOutputMatrix) {
  TinySpec spec;
  TinyModel tiny = MakeTinyModel(spec);
  TempDirectory directory;
  tiny.tensors.erase("lm_head.weight");
  WriteTinyModel(tiny, directory.path());
  EXPECT_THAT(LoadStatus(directory).message(), HasSubstr("lm_head.weight"));
}

TEST(LlamaModel, WrongShapeNamesFileTensorFoundAndExpected) {
  TinyModel tiny = MakeTinyModel({});
  TempDirectory directory;
  tiny.tensors.at("model.layers.0.self_attn.k_proj.weight").shape = {64, 64, 1};
  WriteTinyModel(tiny, directory.path());
  const Status status = LoadStatus(directory);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(directory / "model.safetensors"));
  EXPECT_THAT(status.message(), HasSubstr("'model.layers.0.self_attn.k_proj.weight'"));
  EXPECT_THAT(status.message(), HasSubstr("found shape [64, 64, 1], expected [64, 64]"));
}

TEST(LlamaModel, ConfigThatContradictsTheWeightsIsRefused) {
  TinySpec spec;
  const TinyModel tiny = MakeTinyModel(spec);
  TempDirectory directory;
  WriteTinyModel(tiny, directory.path());
  spec.vocab = 102;
  WriteText(directory / "config.json", TinyConfigJson(spec));
  EXPECT_THAT(LoadStatus(directory).message(),
              HasSubstr("found shape [101, 64], expected [102, 64]"));
}

TEST(LlamaModel, DirectoryWithoutWeightsOrConfigIsNamed) {
  TempDirectory directory;
  EXPECT_THAT(LoadStatus(directory).message(), HasSubstr(directory / "config.json"));
  WriteText(directory / "config.json", TinyConfigJson({}));
  const Status status = LoadStatus(directory);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("neither model.safetensors nor"));
}

}  // namespace
}  // namespace icecache
