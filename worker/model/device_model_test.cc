// The model on a device computes what the model on the CPU computes: every family's peculiarities,
// blocks and single tokens, and whole greedy generations.
#include <algorithm>

#include "kernels/gpu/attention_gpu.h"
#include "tests/conformance/device_suite.h"
#include "tests/models/dense_attention.h"
#include "tests/models/tiny_model.h"
#include "worker/model/device_model.h"
#include "worker/model/sampler.h"
#include "worker/model/step_attention.h"

namespace icecache {
namespace {

TinySpec Spec(const char* architecture, DType dtype, uint64_t seed) {
  TinySpec spec;
  spec.architecture = architecture;
  spec.dtype = dtype;
  spec.seed = seed;
  return spec;
}

class DeviceModelSuite : public gpu::DeviceSuite {
 protected:
  void Load(const TinySpec& spec) {
    WriteTinyModel(MakeTinyModel(spec), directory_.path());
    ModelOptions options;
    options.kv_dtype = DType::kF32;
    auto cpu = LoadModel(directory_.path(), options);
    auto on_device = LoadDeviceModel(directory_.path(), options, *device_);
    ASSERT_TRUE(cpu.ok() && on_device.ok()) << on_device.status().ToString();
    cpu_ = std::move(*cpu);
    model_ = std::move(*on_device);
    EXPECT_EQ(model_->identity(), cpu_->identity());
  }
  void TearDown() override {
    model_.reset();
    DeviceSuite::TearDown();
  }
  // A GPU with a library rounds the activations of blocks to 16-bit weights' type.
  float Tolerance(const TinySpec& spec) const {
    if (GetParam().name != "cuda" || spec.dtype == DType::kF32) return 1e-4f;
    return spec.dtype == DType::kF16 ? 0.05f : 0.25f;
  }

  TempDirectory directory_;
  std::unique_ptr<Model> cpu_, model_;
};

void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                float tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(actual[i], expected[i], tolerance) << i;
}

TEST_P(DeviceModelSuite, LogitsAreThoseOfTheCpu) {
  TinySpec odd = Spec("LlamaForCausalLM", DType::kF16, 4);
  odd.hidden = 44, odd.inner = 50, odd.tied = true;  // no whole vectors
  TinySpec biases = Spec("LlamaForCausalLM", DType::kF32, 6);
  biases.attention_bias = biases.mlp_bias = true;
  TinySpec scaled = Spec("LlamaForCausalLM", DType::kBF16, 9);
  scaled.rope_scaling = R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 2048})";
  for (const TinySpec& spec :
       {Spec("LlamaForCausalLM", DType::kF32, 1), odd, biases, scaled,
        Spec("Qwen2ForCausalLM", DType::kBF16, 13), Spec("Qwen3ForCausalLM", DType::kF16, 15)}) {
    SCOPED_TRACE(testing::Message() << spec.architecture << " seed " << spec.seed);
    Load(spec);
    DenseAttention cpu_attention(cpu_->shape()), attention(model_->shape());
    const std::vector<int32_t> block = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, next = {8};
    uint32_t first = 1000;
    for (const auto& tokens :
         {block, next, next}) {  // 11 tokens, then one by one, the last replayed
      const auto expected = RunBlock(*cpu_, cpu_attention, tokens, first);
      const auto actual = RunBlock(*model_, attention, tokens, first);
      ASSERT_TRUE(expected.ok() && actual.ok()) << actual.status().ToString();
      for (size_t t = 0; t < tokens.size(); ++t) {
        ExpectNear((*actual)[t], (*expected)[t], Tolerance(spec));
      }
      first += static_cast<uint32_t>(tokens.size());
    }
    model_.reset();
  }
}

TEST_P(DeviceModelSuite, GreedyGenerationsAgreeTokenForToken) {
  Load(Spec("LlamaForCausalLM", DType::kF32, 21));
  std::vector<std::vector<int32_t>> texts;
  for (Model* model : {cpu_.get(), model_.get()}) {
    DenseAttention attention(model->shape());
    Sampler sampler({});
    std::vector<int32_t> text = {7, 77, 17};
    auto logits = RunBlock(*model, attention, text, 0);
    while (text.size() < 12) {
      ASSERT_TRUE(logits.ok());
      const int32_t token = sampler.Sample(logits->back());
      text.push_back(token);
      logits = RunBlock(*model, attention, {&token, 1}, static_cast<uint32_t>(text.size()) - 1);
    }
    texts.push_back(std::move(text));
  }
  EXPECT_EQ(texts[1], texts[0]);
}

// Three sequences that join one after the other, at positions of their own, greedy and drawn by
// chance: tokens are those of the CPU, which are those of each sequence alone.
TEST_P(DeviceModelSuite, StepsOfSeveralSequencesChooseTheTokensOfTheCpu) {
  Load(Spec("Qwen3ForCausalLM", DType::kF32, 31));
  const std::vector<SamplerOptions> sampling = {{}, {0.8, 0.9, 5}, {1.5, 1, 6}};
  std::vector<std::vector<std::vector<int32_t>>> texts;  // by model and sequence
  for (Model* model : {cpu_.get(), model_.get()}) {
    std::vector<std::unique_ptr<DenseAttention>> attentions;
    std::vector<Sampler> samplers;
    auto& text = texts.emplace_back();
    for (uint32_t step = 0; step < 6; ++step) {
      if (step % 2 == 0) {
        attentions.push_back(std::make_unique<DenseAttention>(model->shape()));
        samplers.emplace_back(sampling[text.size()]);
        text.push_back({static_cast<int32_t>(7 + step)});
      }
      std::vector<StepToken> tokens;
      std::vector<TokenChoice> choices;
      std::vector<LayerAttention*> rows;
      for (uint32_t i = 0; i < text.size(); ++i) {
        tokens.push_back(
            {text[i].back(), TokenPos(1000 * i + static_cast<uint32_t>(text[i].size()) - 1)});
        choices.push_back({i, samplers[i].Next()});
        rows.push_back(attentions[i].get());
      }
      EachSequence attention(model->shape(), rows, false);
      const Status status = model->Step(tokens, attention);
      ASSERT_TRUE(status.ok()) << status.ToString();
      std::vector<int32_t> chosen(text.size());
      ASSERT_TRUE(model->Choose(choices, chosen.data()).ok());
      std::vector<float> logits(model->vocab_size());
      ASSERT_TRUE(model->StepLogits(0, logits.data()).ok());
      EXPECT_EQ(Sampler({}).Sample(logits), chosen[0]) << "the first is greedy";
      for (uint32_t i = 0; i < text.size(); ++i) text[i].push_back(chosen[i]);
    }
  }
  EXPECT_EQ(texts[1], texts[0]);
}

TEST_P(DeviceModelSuite, RefusesStepsThatCannotRun) {
  Load(Spec("LlamaForCausalLM", DType::kF32, 23));
  DenseAttention dense(model_->shape());
  EachSequence one(model_->shape(), {&dense}, false);
  for (Model* model : {cpu_.get(), model_.get()}) {
    const auto step = [&](StepToken token) { return model->Step({&token, 1}, one).code(); };
    EXPECT_EQ(step({-1, TokenPos(0)}), StatusCode::kInvalidArgument);
    EXPECT_EQ(step({0, TokenPos(limits::kContextTokensMax)}), StatusCode::kOutOfRange);
    EXPECT_EQ(model->Step({}, one).code(), StatusCode::kInvalidArgument);
  }
}

TEST_P(DeviceModelSuite, ReturnsErrorsOfAttentionAndGoesOn) {
  class Failing final : public LayerAttention {
   public:
    Status Attend(LayerId, TokenPos, uint32_t, const float*, const float*, const float*,
                  float*) override {
      return Unavailable("gone");
    }
  };
  Load(Spec("LlamaForCausalLM", DType::kF32, 22));
  Failing failing;
  const std::vector<int32_t> token = {5};
  EXPECT_EQ(RunBlock(*model_, failing, token, 0).status().code(), StatusCode::kUnavailable);
  DenseAttention cpu_attention(cpu_->shape()), attention(model_->shape());
  const auto expected = RunBlock(*cpu_, cpu_attention, token, 0);
  const auto actual = RunBlock(*model_, attention, token, 0);
  ASSERT_TRUE(actual.ok());
  ExpectNear((*actual)[0], (*expected)[0], 1e-4f);
}

INSTANTIATE_DEVICES(DeviceModelSuite);

TEST(DeviceModel, WeightsThatDoNotFitAreRefusedByName) {
  const TempDirectory directory;
  WriteTinyModel(MakeTinyModel({}), directory.path());
  gpu::EmulatedDeviceOptions options;
  options.memory_bytes_max = 100000;
  const auto device = gpu::MakeEmulatedDevice(options);
  const auto model = LoadDeviceModel(directory.path(), {}, *device);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(model.status().message().find("weights of layer"), std::string::npos);
  EXPECT_NE(model.status().message().find("--gpu-memory"), std::string::npos);
}

}  // namespace
}  // namespace icecache
