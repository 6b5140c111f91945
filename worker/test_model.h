// For tests: a model that needs no file.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "worker/model/model.h"
#include "worker/test_rows.h"

namespace icecache::test {

// A small random transformer without MLP and RoPE: enough for every token to depend on all before
// it.
class RandomModel final : public Model {
 public:
  explicit RandomModel(uint64_t seed) : rng_(seed) {
    embedding_ = RandomFloats(rng_, size_t{kVocab} * kHidden);
    for (uint32_t l = 0; l < shape_.layers; ++l) {
      for (const uint32_t width : {Width(4), Width(2), Width(2)}) {
        weights_.push_back(RandomFloats(rng_, size_t{kHidden} * width, 0.35f));
      }
      weights_.push_back(RandomFloats(rng_, size_t{Width(4)} * kHidden, 0.35f));
    }
  }
  const ModelShape& shape() const override { return shape_; }
  uint32_t vocab_size() const override { return kVocab; }
  uint32_t hidden_size() const override { return kHidden; }
  std::string identity() const override { return "random"; }
  Status Embed(std::span<const int32_t> tokens, float* hidden) override {
    for (size_t t = 0; t < tokens.size(); ++t) {
      std::copy_n(embedding_.data() + static_cast<size_t>(tokens[t]) * kHidden, kHidden,
                  hidden + t * kHidden);
    }
    return OkStatus();
  }
  Status Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
               LayerAttention& attention) override {
    const auto position = [&](uint32_t t) { return first.value + t; };
    return Run(layer, tokens, hidden, position,
               [&](const float* q, const float* k, const float* v, float* out) {
                 return attention.Attend(layer, first, tokens, q, k, v, out);
               });
  }
  Status Step(std::span<const StepToken> tokens, StepAttention& attention) override {
    KV_RETURN_IF_ERROR(CheckStep(tokens));
    const auto rows = static_cast<uint32_t>(tokens.size());
    step_.resize(tokens.size() * kHidden);
    for (uint32_t i = 0; i < rows; ++i) {
      KV_RETURN_IF_ERROR(Embed({&tokens[i].token, 1}, step_.data() + size_t{i} * kHidden));
    }
    const auto position = [&](uint32_t t) { return tokens[t].position.value; };
    for (uint16_t l = 0; l < shape_.layers; ++l) {
      KV_RETURN_IF_ERROR(Run(LayerId(l), rows, step_.data(), position,
                             [&](const float* q, const float* k, const float* v, float* out) {
                               return attention.AttendStep(LayerId(l), tokens, q, k, v, out);
                             }));
    }
    return OkStatus();
  }
  Status StepLogits(uint32_t row, float* logits) override {
    Logits(step_.data() + size_t{row} * kHidden, logits);
    return OkStatus();
  }
  Status Choose(std::span<const TokenChoice> choices, int32_t* tokens) override {
    std::vector<float> logits(kVocab);
    Candidates candidates;
    for (const TokenChoice& choice : choices) {
      KV_RETURN_IF_ERROR(StepLogits(choice.row, logits.data()));
      *tokens++ = ChooseToken(logits, choice.draw, &candidates);
    }
    return OkStatus();
  }
  void Logits(const float* hidden, float* logits) override {
    for (uint32_t i = 0; i < kVocab; ++i) {
      logits[i] = 0;
      for (uint32_t d = 0; d < kHidden; ++d) {
        logits[i] += hidden[d] * embedding_[size_t{i} * kHidden + d];
      }
    }
  }
  std::mt19937_64& rng() { return rng_; }
  static constexpr uint32_t kVocab = 97;

 private:
  static constexpr uint32_t kHidden = 24;
  template <typename Position, typename Attend>
  Status Run(LayerId layer, uint32_t tokens, float* hidden, const Position& position,
             const Attend& attend) {
    const auto* w = &weights_[size_t{layer.value} * 4];
    std::vector<float> q = Multiply(hidden, tokens, kHidden, w[0], Width(4));
    for (float& x : q) x /= 4;  // 1/sqrt(head_dim)
    const std::vector<float> k = Multiply(hidden, tokens, kHidden, w[1], Width(2));
    const std::vector<float> v = Multiply(hidden, tokens, kHidden, w[2], Width(2));
    std::vector<float> out(q.size());
    KV_RETURN_IF_ERROR(attend(q.data(), k.data(), v.data(), out.data()));
    const std::vector<float> add = Multiply(out.data(), tokens, Width(4), w[3], kHidden);
    for (uint32_t t = 0; t < tokens; ++t) {
      float* const row = hidden + size_t{t} * kHidden;
      float square = 0;
      for (uint32_t d = 0; d < kHidden; ++d) {
        row[d] += add[size_t{t} * kHidden + d] + 0.1f * static_cast<float>(position(t) % 7);
        square += row[d] * row[d];
      }
      for (uint32_t d = 0; d < kHidden; ++d) row[d] /= std::sqrt(square / kHidden) + 1e-6f;
    }
    return OkStatus();
  }
  uint32_t Width(uint32_t heads) const { return heads * shape_.head_dim; }
  static std::vector<float> Multiply(const float* x, uint32_t rows, uint32_t inner,
                                     const std::vector<float>& w, uint32_t columns) {
    std::vector<float> y(size_t{rows} * columns);
    for (uint32_t r = 0; r < rows; ++r) {
      for (uint32_t i = 0; i < inner; ++i) {
        for (uint32_t c = 0; c < columns; ++c) {
          y[size_t{r} * columns + c] += x[size_t{r} * inner + i] * w[size_t{i} * columns + c];
        }
      }
    }
    return y;
  }
  const ModelShape shape_ = SmallShape(3, 2, 2, 16);
  std::mt19937_64 rng_;
  std::vector<float> embedding_, step_;
  std::vector<std::vector<float>> weights_;  // per layer q, k, v, o
};

inline std::vector<int32_t> RandomTokens(std::mt19937_64& rng, size_t count) {
  std::vector<int32_t> tokens(count);
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng() % RandomModel::kVocab);
  return tokens;
}

}  // namespace icecache::test
