#include "worker/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "common/status.h"

namespace icecache {
namespace {

constexpr double kTurn = 2 * std::numbers::pi;

// Long wavelengths are stretched by the factor, short ones kept, those between are blended.
double ScaleLlama3(double frequency, const RopeScaling& scaling) {
  const double wavelength = kTurn / frequency;
  if (wavelength < scaling.original_positions / scaling.high_freq_factor) return frequency;
  if (wavelength > scaling.original_positions / scaling.low_freq_factor)
    return frequency / scaling.factor;
  const double keep = (scaling.original_positions / wavelength - scaling.low_freq_factor) /
                      (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - keep) * frequency / scaling.factor + keep * frequency;
}

// The pair that turns `rotations` times within the original length, as a real number.
double YarnBorder(double rotations, const ModelConfig& config) {
  return config.head_dim * std::log(config.rope_scaling.original_positions / (rotations * kTurn)) /
         (2 * std::log(config.rope_theta));
}

double ScaleYarn(double frequency, uint32_t pair, const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  double low = YarnBorder(scaling.beta_fast, config);
  double high = YarnBorder(scaling.beta_slow, config);
  if (scaling.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, config.head_dim - 1.0);
  if (low == high) high += 0.001;  // as the published code does, to divide by something
  const double stretch = std::clamp((pair - low) / (high - low), 0.0, 1.0);
  return stretch * frequency / scaling.factor + (1 - stretch) * frequency;
}

}  // namespace

std::vector<double> RopeFrequencies(const ModelConfig& config) {
  std::vector<double> frequencies(config.head_dim / 2);
  for (uint32_t pair = 0; pair < frequencies.size(); ++pair) {
    const double frequency = std::pow(config.rope_theta, -2.0 * pair / config.head_dim);
    switch (config.rope_scaling.kind) {
      case RopeScaling::Kind::kNone:
        frequencies[pair] = frequency;
        break;
      case RopeScaling::Kind::kLinear:
        frequencies[pair] = frequency / config.rope_scaling.factor;
        break;
      case RopeScaling::Kind::kLlama3:
        frequencies[pair] = ScaleLlama3(frequency, config.rope_scaling);
        break;
      case RopeScaling::Kind::kYarn:
        frequencies[pair] = ScaleYarn(frequency, pair, config);
        break;
    }
  }
  return frequencies;
}

Rope::Rope(const ModelConfig& config)
    : half_(config.head_dim / 2),
      attention_factor_(config.rope_scaling.attention_factor),
      frequencies_(RopeFrequencies(config)) {}

void Rope::Prepare(uint32_t first, uint32_t tokens) {
  if (block_ && first == first_ && tokens <= tokens_) return;
  block_ = true;
  first_ = first;
  tokens_ = tokens;
  cos_.resize(size_t{tokens} * half_);
  sin_.resize(size_t{tokens} * half_);
  for (uint32_t t = 0; t < tokens; ++t) Fill(t, first + t);
}

void Rope::Prepare(std::span<const uint32_t> positions) {
  block_ = false;
  tokens_ = static_cast<uint32_t>(positions.size());
  cos_.resize(size_t{tokens_} * half_);
  sin_.resize(size_t{tokens_} * half_);
  for (uint32_t t = 0; t < tokens_; ++t) Fill(t, positions[t]);
}

void Rope::Fill(uint32_t token, uint32_t position) {
  for (uint32_t pair = 0; pair < half_; ++pair) {
    const double angle = double{1} * position * frequencies_[pair];
    cos_[size_t{token} * half_ + pair] = static_cast<float>(std::cos(angle) * attention_factor_);
    sin_[size_t{token} * half_ + pair] = static_cast<float>(std::sin(angle) * attention_factor_);
  }
}

void Rope::Apply(float* x, uint32_t token, uint32_t heads, float scale) const {
  KV_CHECK(token < tokens_);
  const float* cos = cos_.data() + size_t{token} * half_;
  const float* sin = sin_.data() + size_t{token} * half_;
  for (uint32_t head = 0; head < heads; ++head) {
    float* low = x + size_t{head} * 2 * half_;
    float* high = low + half_;
    for (uint32_t pair = 0; pair < half_; ++pair) {
      const float a = low[pair] * scale;
      const float b = high[pair] * scale;
      low[pair] = a * cos[pair] - b * sin[pair];
      high[pair] = b * cos[pair] + a * sin[pair];
    }
  }
}

}  // namespace icecache
