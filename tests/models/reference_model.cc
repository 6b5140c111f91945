#include "tests/models/reference_model.h"

#include <cmath>
#include <complex>
#include <numbers>

namespace icecache {
namespace {

using Vector = std::vector<double>;

// Angle per position of pair j, from the scaling's own words.
double Frequency(const TinySpec& spec, const ReferenceScaling& s, uint32_t j) {
  const double plain = 1.0 / std::pow(spec.rope_theta, 2.0 * j / spec.head_dim);
  const double turns = s.original * plain / (2 * std::numbers::pi);  // within the original length
  switch (s.kind) {
    case ReferenceScaling::Kind::kNone:
      return plain;
    case ReferenceScaling::Kind::kLinear:
      return plain / s.factor;
    case ReferenceScaling::Kind::kLlama3: {
      // Fewer turns than `low`: stretched; more than `high`: kept; between: linear in the turns.
      if (turns < s.low) return plain / s.factor;
      if (turns > s.high) return plain;
      const double t = (turns - s.low) / (s.high - s.low);
      return plain * ((1 - t) / s.factor + t);
    }
    case ReferenceScaling::Kind::kYarn:
      break;
  }
  // YaRN blends over the pair's index, between the pairs that turn beta_fast and beta_slow times.
  const auto pair_of = [&](double rotations) {
    return spec.head_dim / 2.0 * std::log(s.original / (2 * std::numbers::pi * rotations)) /
           std::log(spec.rope_theta);
  };
  const double from = std::fmax(0, std::floor(pair_of(s.beta_fast)));
  const double to = std::fmin(spec.head_dim - 1, std::ceil(pair_of(s.beta_slow)));
  const double t = std::fmin(1, std::fmax(0, (j - from) / (to - from)));
  return plain * (1 - t) + plain / s.factor * t;
}

class Reference {
 public:
  Reference(const TinyModel& model, const ReferenceScaling& scaling)
      : model_(model), spec_(model.spec), scaling_(scaling), cache_(spec_.layers) {}

  Vector Step(int32_t token, uint32_t position) {
    const Vector& table = Values("model.embed_tokens.weight");
    const auto row = table.begin() + static_cast<ptrdiff_t>(token) * spec_.hidden;
    Vector x(row, row + spec_.hidden);
    for (uint32_t layer = 0; layer < spec_.layers; ++layer) {
      const std::string p = "model.layers." + std::to_string(layer) + ".";
      Add(x, Attention(p + "self_attn.", layer, position, Norm(x, p + "input_layernorm.weight")));
      Add(x, Mlp(p + "mlp.", Norm(x, p + "post_attention_layernorm.weight")));
    }
    x = Norm(x, "model.norm.weight");
    return Project(x, spec_.tied ? "model.embed_tokens" : "lm_head");
  }

 private:
  struct Cached {
    std::vector<Vector> keys, values;  // per position: kv_heads * head_dim
  };

  const Vector& Values(const std::string& name) const { return model_.tensors.at(name).values; }

  static void Add(Vector& x, const Vector& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  Vector Project(const Vector& x, const std::string& name) const {
    const TinyTensor& w = model_.tensors.at(name + ".weight");
    const auto bias = model_.tensors.find(name + ".bias");
    Vector y(w.shape[0]);
    for (size_t row = 0; row < y.size(); ++row) {
      y[row] = bias == model_.tensors.end() ? 0 : bias->second.values[row];
      for (size_t col = 0; col < x.size(); ++col) y[row] += w.values[row * x.size() + col] * x[col];
    }
    return y;
  }

  Vector Norm(const Vector& x, const std::string& weight) const {
    double mean_square = 0;
    for (const double value : x) mean_square += value * value / static_cast<double>(x.size());
    const Vector& w = Values(weight);
    Vector y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = w[i] * x[i] / std::sqrt(mean_square + spec_.eps);
    return y;
  }

  // One head of q or k: its norm, where the family has one, and its rotation.
  Vector Head(const Vector& all, uint32_t head, uint32_t position, const std::string& norm) const {
    Vector x(all.begin() + head * spec_.head_dim, all.begin() + (head + 1) * spec_.head_dim);
    if (spec_.has_qk_norm()) x = Norm(x, norm);
    const uint32_t half = spec_.head_dim / 2;
    const double length =
        scaling_.kind == ReferenceScaling::Kind::kYarn ? 0.1 * std::log(scaling_.factor) + 1 : 1.0;
    for (uint32_t j = 0; j < half; ++j) {
      const std::complex<double> turned =
          std::complex<double>(x[j], x[j + half]) *
          std::polar(length, position * Frequency(spec_, scaling_, j));
      x[j] = turned.real();
      x[j + half] = turned.imag();
    }
    return x;
  }

  Vector Attention(const std::string& p, uint32_t layer, uint32_t position, const Vector& x) {
    const Vector q_all = Project(x, p + "q_proj");
    const Vector k_all = Project(x, p + "k_proj");
    Vector keys;
    for (uint32_t head = 0; head < spec_.kv_heads; ++head) {
      const Vector k = Head(k_all, head, position, p + "k_norm.weight");
      keys.insert(keys.end(), k.begin(), k.end());
    }
    Cached& cache = cache_[layer];
    cache.keys.push_back(keys);
    cache.values.push_back(Project(x, p + "v_proj"));
    Vector out(size_t{spec_.query_heads} * spec_.head_dim, 0.0);
    for (uint32_t head = 0; head < spec_.query_heads; ++head) {
      const Vector q = Head(q_all, head, position, p + "q_norm.weight");
      const size_t shared = size_t{head} * spec_.kv_heads / spec_.query_heads * spec_.head_dim;
      double denominator = 0;
      Vector sum(spec_.head_dim, 0.0);
      for (size_t t = 0; t < cache.keys.size(); ++t) {
        double score = 0;
        for (uint32_t d = 0; d < spec_.head_dim; ++d) score += q[d] * cache.keys[t][shared + d];
        const double weight = std::exp(score / std::sqrt(double{1} * spec_.head_dim));
        denominator += weight;
        for (uint32_t d = 0; d < spec_.head_dim; ++d)
          sum[d] += weight * cache.values[t][shared + d];
      }
      for (uint32_t d = 0; d < spec_.head_dim; ++d)
        out[size_t{head} * spec_.head_dim + d] = sum[d] / denominator;
    }
    return Project(out, p + "o_proj");
  }

  Vector Mlp(const std::string& p, const Vector& x) const {
    Vector gate = Project(x, p + "gate_proj");
    const Vector up = Project(x, p + "up_proj");
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    return Project(gate, p + "down_proj");
  }

  const TinyModel& model_;
  const TinySpec& spec_;
  const ReferenceScaling scaling_;
  std::vector<Cached> cache_;
};

}  // namespace

std::vector<std::vector<double>> ReferenceLogits(const TinyModel& model,
                                                 const ReferenceScaling& scaling,
                                                 const std::vector<int32_t>& tokens,
                                                 uint32_t first) {
  Reference reference(model, scaling);
  std::vector<std::vector<double>> logits;
  for (size_t i = 0; i < tokens.size(); ++i) {
    logits.push_back(reference.Step(tokens[i], first + static_cast<uint32_t>(i)));
  }
  return logits;
}

}  // namespace icecache
