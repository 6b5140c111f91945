// For tests: random rows, and attention in float64 over explicit lists of tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "kernels/distance.h"
#include "worker/layer_rows.h"

namespace icecache::test {

inline ModelShape SmallShape(uint32_t layers = 2, uint32_t kv_heads = 2, uint32_t group = 2,
                             uint32_t head_dim = 16, DType dtype = DType::kF16) {
  return {layers, kv_heads, kv_heads * group, head_dim, dtype};
}

inline std::vector<float> RandomFloats(std::mt19937_64& rng, size_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(count);
  for (float& f : x) f = normal(rng);
  return x;
}

// K and V of a whole sequence of one layer in f32, [tokens, kv_heads, head_dim], rounded to the
// dtype.
struct Sequence {
  Sequence(const ModelShape& s, std::mt19937_64& rng, uint32_t tokens)
      : shape(s),
        rows(s, TokenPos(0), tokens),
        k(RandomFloats(rng, size_t{tokens} * s.kv_heads * s.head_dim)),
        v(RandomFloats(rng, k.size())) {
    rows.RoundAndStore(0, tokens, k.data(), v.data());
  }
  size_t row() const { return size_t{shape.kv_heads} * shape.head_dim; }

  ModelShape shape;
  LayerRows rows;
  std::vector<float> k, v;
};

// Softmax attention of one query head (scaled query) over the given tokens, in float64.
inline std::vector<double> AttendReference(const Sequence& s, uint32_t query_head, const float* q,
                                           std::span<const uint32_t> tokens) {
  const uint32_t head = query_head / s.shape.group();
  const uint32_t dim = s.shape.head_dim;
  std::vector<double> logits, out(dim, 0.0);
  double max = -1e300, sum = 0;
  for (const uint32_t t : tokens) {
    double logit = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      logit += double{q[size_t{query_head} * dim + d]} * s.k[t * s.row() + head * dim + d];
    }
    logits.push_back(logit);
    max = std::max(max, logit);
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - max);
    sum += weight;
    for (uint32_t d = 0; d < dim; ++d) {
      out[d] += weight * s.v[tokens[i] * s.row() + head * dim + d];
    }
  }
  for (double& x : out) x /= sum;
  return out;
}

inline double MaxDifference(const float* found, std::span<const double> expected) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(found[i] - expected[i]));
  }
  return worst;
}

}  // namespace icecache::test
