// RoPE: rotary position embedding in the rotate-half form, with the scalings of RopeScaling.
//
// Pair i of a head is (x[i], x[i + head_dim / 2]), turned by position * frequency(i). Angles,
// cosines and sines are computed in double: at position 100,000 an f32 angle is already off by
// 0.004.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "worker/model/model_config.h"

namespace icecache {

// Frequencies of head_dim / 2 pairs, in radians per position.
std::vector<double> RopeFrequencies(const ModelConfig& config);

// Cosines and sines of one block of positions, kept until another block is asked for: the layers of
// a block share them, and memory does not grow with the context. One thread.
class Rope {
 public:
  explicit Rope(const ModelConfig& config);

  // Afterwards Apply() turns rows by positions first .. first + tokens - 1.
  void Prepare(uint32_t first, uint32_t tokens);
  // The same for rows at positions of their own.
  void Prepare(std::span<const uint32_t> positions);
  // Turns x[heads, head_dim], the row of the block's token `token` (0-based), in place, and
  // multiplies it by `scale` on the way. REQUIRES: token < tokens of Prepare(). Any thread while no
  // Prepare runs.
  void Apply(float* x, uint32_t token, uint32_t heads, float scale) const;

 private:
  const uint32_t half_;
  const double attention_factor_;
  const std::vector<double> frequencies_;
  void Fill(uint32_t token, uint32_t position);

  uint32_t first_ = 0;
  uint32_t tokens_ = 0;
  bool block_ = false;  // tokens_ from first_ on
  std::vector<float> cos_;  // [tokens_, half_]
  std::vector<float> sin_;
};

}  // namespace icecache
