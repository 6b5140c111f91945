// The forward pass of every supported family: RMSNorm, attention with RoPE, SwiGLU, in f32.
#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/distance.h"
#include "worker/model/gemm.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model.h"
#include "worker/model/rope.h"

namespace icecache {
namespace {

// Tokens that go through a layer's products together: enough to hide the conversion of weights, few
// enough that their activations stay in cache.
constexpr uint32_t kChunkTokens = 512;
constexpr uint32_t kRowsPerShare = 16;   // of element-wise work given to a thread at once
constexpr uint32_t kSharedRowsMin = 64;  // fewer rows are done in place

float SumOfSquares(const float* x, uint32_t count) {
  constexpr uint32_t kLanes = 16;  // independent sums, so that the compiler may use vectors
  float lanes[kLanes] = {};
  uint32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  }
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  for (; i < count; ++i) sum += double{x[i]} * x[i];
  return static_cast<float>(sum);
}

// y may alias x.
void RmsNorm(const float* x, const std::vector<float>& weight, double eps, float* y) {
  const auto count = static_cast<uint32_t>(weight.size());
  const auto scale =
      static_cast<float>(1.0 / std::sqrt(double{SumOfSquares(x, count)} / count + eps));
  for (uint32_t i = 0; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

// gate = silu(gate) * up. `scratch` holds `count` floats. exp is taken of -|x|, which cannot
// overflow.
void SwiGlu(const float* up, uint32_t count, float* scratch, float* gate) {
  for (uint32_t i = 0; i < count; ++i) scratch[i] = -std::fabs(gate[i]);
  ExpShifted(scratch, count, 0.0f, scratch);
  for (uint32_t i = 0; i < count; ++i) {
    const float sigmoid = (gate[i] >= 0 ? 1.0f : scratch[i]) / (1.0f + scratch[i]);
    gate[i] *= sigmoid * up[i];
  }
}

class LlamaModel final : public Model {
 public:
  LlamaModel(LlamaWeights weights, const ModelOptions& options)
      : weights_(std::move(weights)),
        config_(weights_.config),
        shape_(config_.Shape(options.kv_dtype)),
        rope_(config_),
        gemm_(options.threads) {}

  const ModelShape& shape() const override { return shape_; }
  uint32_t vocab_size() const override { return config_.vocab_size; }
  uint32_t hidden_size() const override { return config_.hidden_size; }
  std::string identity() const override { return weights_.identity; }
  Status Embed(std::span<const int32_t> tokens, float* hidden) override;
  Status Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
               LayerAttention& attention) override;
  void Logits(const float* hidden, float* logits) override;
  Status Step(std::span<const StepToken> tokens, StepAttention& attention) override;
  Status StepLogits(uint32_t row, float* logits) override;
  Status Choose(std::span<const TokenChoice> choices, int32_t* tokens) override;

 private:
  uint32_t q_size() const { return shape_.query_heads * shape_.head_dim; }
  uint32_t kv_size() const { return shape_.kv_heads * shape_.head_dim; }
  void ForRows(uint32_t rows, const ComputeThreads::Body& body);
  void Reserve(uint32_t tokens);
  void ComputeQkv(const LayerWeights& w, uint32_t offset, uint32_t tokens, const float* hidden);
  void AddAttention(const LayerWeights& w, uint32_t offset, uint32_t tokens, float* hidden);
  void AddMlp(const LayerWeights& w, uint32_t tokens, float* hidden);
  // `attend` reads q_, k_, v_ and writes attended_. Rope is prepared.
  template <typename Attend>
  Status RunLayer(LayerId layer, uint32_t tokens, float* hidden, const Attend& attend);

  const LlamaWeights weights_;
  const ModelConfig& config_;
  const ModelShape shape_;

  Rope rope_;
  Gemm gemm_;
  // Scratch of one block: [tokens, ...]; and of one chunk.
  std::vector<float> q_, k_, v_, attended_;
  std::vector<float> normed_, delta_, gate_, up_, exp_;
  std::vector<float> step_hidden_, step_logits_;  // [rows, ...] of the last Step and Choose
  uint32_t step_rows_ = 0;
  Candidates candidates_;
};

Status LlamaModel::Embed(std::span<const int32_t> tokens, float* hidden) {
  return EmbedTokens(weights_, tokens, hidden);
}

void LlamaModel::ForRows(uint32_t rows, const ComputeThreads::Body& body) {
  if (rows < kSharedRowsMin) {
    for (uint32_t row = 0; row < rows; ++row) body(row, 0);
    return;
  }
  gemm_.threads().For((rows + kRowsPerShare - 1) / kRowsPerShare,
                      [&](uint32_t share, uint32_t thread) {
                        const uint32_t end = std::min(rows, (share + 1) * kRowsPerShare);
                        for (uint32_t row = share * kRowsPerShare; row < end; ++row)
                          body(row, thread);
                      });
}

void LlamaModel::Reserve(uint32_t tokens) {
  const auto grow = [](std::vector<float>& v, size_t floats) {
    if (v.size() < floats) v.resize(floats);
  };
  const size_t chunk = std::min(tokens, kChunkTokens);
  grow(q_, size_t{tokens} * q_size());
  grow(k_, size_t{tokens} * kv_size());
  grow(v_, size_t{tokens} * kv_size());
  grow(attended_, size_t{tokens} * q_size());
  grow(normed_, chunk * config_.hidden_size);
  grow(delta_, chunk * config_.hidden_size);
  grow(gate_, chunk * config_.intermediate_size);
  grow(up_, chunk * config_.intermediate_size);
  grow(exp_, size_t{gemm_.threads().count()} * config_.intermediate_size);
}

// q_, k_, v_ of the block's tokens offset .. offset + tokens; `hidden` points at the first of them.
void LlamaModel::ComputeQkv(const LayerWeights& w, uint32_t offset, uint32_t tokens,
                            const float* hidden) {
  ForRows(tokens, [&](uint32_t t, uint32_t) {
    const size_t at = size_t{t} * config_.hidden_size;
    RmsNorm(hidden + at, w.input_norm, config_.rms_norm_eps, normed_.data() + at);
  });
  float* q = q_.data() + size_t{offset} * q_size();
  float* k = k_.data() + size_t{offset} * kv_size();
  float* v = v_.data() + size_t{offset} * kv_size();
  gemm_.Multiply(normed_.data(), tokens, w.q.weight, w.q.bias_or_null(), q);
  gemm_.Multiply(normed_.data(), tokens, w.k.weight, w.k.bias_or_null(), k);
  gemm_.Multiply(normed_.data(), tokens, w.v.weight, w.v.bias_or_null(), v);
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  const auto norm_heads = [&](const std::vector<float>& weight, uint32_t heads, float* x) {
    if (weight.empty()) return;
    for (uint32_t h = 0; h < heads; ++h) {
      float* head = x + size_t{h} * shape_.head_dim;
      RmsNorm(head, weight, config_.rms_norm_eps, head);
    }
  };
  ForRows(tokens, [&](uint32_t t, uint32_t) {
    float* q_row = q + size_t{t} * q_size();
    float* k_row = k + size_t{t} * kv_size();
    norm_heads(w.q_norm, shape_.query_heads, q_row);
    norm_heads(w.k_norm, shape_.kv_heads, k_row);
    rope_.Apply(q_row, offset + t, shape_.query_heads, scale);
    rope_.Apply(k_row, offset + t, shape_.kv_heads, 1.0f);
  });
}

void LlamaModel::AddAttention(const LayerWeights& w, uint32_t offset, uint32_t tokens,
                              float* hidden) {
  gemm_.Multiply(attended_.data() + size_t{offset} * q_size(), tokens, w.o.weight,
                 w.o.bias_or_null(), delta_.data());
  const size_t count = size_t{tokens} * config_.hidden_size;
  for (size_t i = 0; i < count; ++i) hidden[i] += delta_[i];
}

void LlamaModel::AddMlp(const LayerWeights& w, uint32_t tokens, float* hidden) {
  const uint32_t inner = config_.intermediate_size;
  ForRows(tokens, [&](uint32_t t, uint32_t) {
    const size_t at = size_t{t} * config_.hidden_size;
    RmsNorm(hidden + at, w.post_norm, config_.rms_norm_eps, normed_.data() + at);
  });
  gemm_.Multiply(normed_.data(), tokens, w.gate.weight, w.gate.bias_or_null(), gate_.data());
  gemm_.Multiply(normed_.data(), tokens, w.up.weight, w.up.bias_or_null(), up_.data());
  ForRows(tokens, [&](uint32_t t, uint32_t thread) {
    SwiGlu(up_.data() + size_t{t} * inner, inner, exp_.data() + size_t{thread} * inner,
           gate_.data() + size_t{t} * inner);
  });
  gemm_.Multiply(gate_.data(), tokens, w.down.weight, w.down.bias_or_null(), delta_.data());
  const size_t count = size_t{tokens} * config_.hidden_size;
  for (size_t i = 0; i < count; ++i) hidden[i] += delta_[i];
}

Status LlamaModel::Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
                         LayerAttention& attention) {
  KV_CHECK(layer.value < weights_.layers.size());
  if (uint64_t{first.value} + tokens > limits::kContextTokensMax) {
    return OutOfRange("position " + std::to_string(uint64_t{first.value} + tokens) +
                      ", expected at most " + std::to_string(limits::kContextTokensMax));
  }
  if (tokens == 0) return OkStatus();
  rope_.Prepare(first.value, tokens);
  return RunLayer(layer, tokens, hidden, [&] {
    return attention.Attend(layer, first, tokens, q_.data(), k_.data(), v_.data(),
                            attended_.data());
  });
}

template <typename Attend>
Status LlamaModel::RunLayer(LayerId layer, uint32_t tokens, float* hidden, const Attend& attend) {
  const LayerWeights& w = weights_.layers[layer.value];
  Reserve(tokens);
  const auto for_chunks = [&](const auto& body) {
    for (uint32_t offset = 0; offset < tokens; offset += kChunkTokens) {
      body(offset, std::min(kChunkTokens, tokens - offset),
           hidden + size_t{offset} * config_.hidden_size);
    }
  };
  for_chunks(
      [&](uint32_t offset, uint32_t count, float* rows) { ComputeQkv(w, offset, count, rows); });
  KV_RETURN_IF_ERROR(attend());
  for_chunks([&](uint32_t offset, uint32_t count, float* rows) {
    AddAttention(w, offset, count, rows);
    AddMlp(w, count, rows);
  });
  return OkStatus();
}

void LlamaModel::Logits(const float* hidden, float* logits) {
  Reserve(1);
  RmsNorm(hidden, weights_.final_norm, config_.rms_norm_eps, normed_.data());
  gemm_.Multiply(normed_.data(), 1, weights_.output, nullptr, logits);
}

Status LlamaModel::Step(std::span<const StepToken> tokens, StepAttention& attention) {
  KV_RETURN_IF_ERROR(CheckStep(tokens));
  step_rows_ = static_cast<uint32_t>(tokens.size());
  step_hidden_.resize(size_t{step_rows_} * config_.hidden_size);
  std::vector<uint32_t> positions;
  for (uint32_t i = 0; i < step_rows_; ++i) {
    KV_RETURN_IF_ERROR(EmbedTokens(weights_, {&tokens[i].token, 1},
                                   step_hidden_.data() + size_t{i} * config_.hidden_size));
    positions.push_back(tokens[i].position.value);
  }
  rope_.Prepare(positions);
  KV_CHECK(!attention.on_device());
  for (uint16_t l = 0; l < shape_.layers; ++l) {
    const LayerId layer(l);
    KV_RETURN_IF_ERROR(RunLayer(layer, step_rows_, step_hidden_.data(), [&] {
      return attention.AttendStep(layer, tokens, q_.data(), k_.data(), v_.data(), attended_.data());
    }));
  }
  return OkStatus();
}

Status LlamaModel::StepLogits(uint32_t row, float* logits) {
  KV_CHECK(row < step_rows_);
  Logits(step_hidden_.data() + size_t{row} * config_.hidden_size, logits);
  return OkStatus();
}

Status LlamaModel::Choose(std::span<const TokenChoice> choices, int32_t* tokens) {
  const auto count = static_cast<uint32_t>(choices.size());
  const size_t width = config_.hidden_size;
  Reserve(count);
  for (uint32_t i = 0; i < count; ++i) {
    KV_CHECK(choices[i].row < step_rows_);
    RmsNorm(step_hidden_.data() + choices[i].row * width, weights_.final_norm, config_.rms_norm_eps,
            normed_.data() + i * width);
  }
  step_logits_.resize(size_t{count} * config_.vocab_size);
  gemm_.Multiply(normed_.data(), count, weights_.output, nullptr, step_logits_.data());
  for (uint32_t i = 0; i < count; ++i) {
    const std::span<const float> logits(step_logits_.data() + size_t{i} * config_.vocab_size,
                                        config_.vocab_size);
    tokens[i] = ChooseToken(logits, choices[i].draw, &candidates_);
  }
  return OkStatus();
}

}  // namespace

Status CheckStep(std::span<const StepToken> tokens) {
  if (tokens.empty() || tokens.size() > limits::kSelectsPerBatchMax) {
    return InvalidArgument("a step of " + std::to_string(tokens.size()) +
                           " sequences, expected 1 to " +
                           std::to_string(limits::kSelectsPerBatchMax));
  }
  for (const StepToken& token : tokens) {
    if (token.position.value < limits::kContextTokensMax) continue;
    return OutOfRange("position " + std::to_string(token.position.value) + ", expected less than " +
                      std::to_string(limits::kContextTokensMax));
  }
  return OkStatus();
}

Result<std::unique_ptr<Model>> LoadModel(const std::string& directory,
                                         const ModelOptions& options) {
  KV_ASSIGN_OR_RETURN(LlamaWeights weights, LoadLlamaWeights(directory));
  return std::unique_ptr<Model>(std::make_unique<LlamaModel>(std::move(weights), options));
}

}  // namespace icecache
