#include "worker/model/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace icecache {
namespace {

// Weights below this share of the most likely token cannot change a 53-bit draw.
constexpr double kLogWeightMin = -40;

int32_t ArgMax(std::span<const float> logits) {
  size_t best = 0;
  while (best + 1 < logits.size() && std::isnan(logits[best])) ++best;
  for (size_t i = best + 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return static_cast<int32_t>(best);
}

}  // namespace

Status SamplerOptions::Validate() const {
  if (!(temperature >= 0) || !std::isfinite(temperature)) {
    return InvalidArgument("temperature is " + std::to_string(temperature) +
                           ", expected 0 (greedy) or more");
  }
  if (!(top_p > 0 && top_p <= 1)) {
    return InvalidArgument("top-p is " + std::to_string(top_p) +
                           ", expected above 0 and at most 1");
  }
  return OkStatus();
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {
  KV_CHECK(options.Validate().ok());
}

// SplitMix64 (Steele, Lea, Flood 2014): one 64-bit word of state, any seed is good.
double Sampler::NextUniform() {
  state_ += 0x9e3779b97f4a7c15ull;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

Draw Sampler::Next() {
  Draw draw{options_.temperature, options_.top_p};
  if (options_.temperature > 0) draw.uniform = NextUniform();
  return draw;
}

int32_t ChooseToken(std::span<const float> logits, const Draw& draw, Candidates* scratch) {
  KV_CHECK(!logits.empty());
  const int32_t best = ArgMax(logits);
  if (draw.temperature == 0) return best;
  const double top = logits[static_cast<size_t>(best)];
  Candidates& candidates = *scratch;
  candidates.clear();
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double log_weight = (logits[i] - top) / draw.temperature;
    if (!(log_weight >= kLogWeightMin)) continue;  // too small, or NaN
    candidates.emplace_back(std::exp(log_weight), static_cast<int32_t>(i));
    total += candidates.back().first;
  }
  if (candidates.empty()) return best;  // an infinite or NaN logit at the top
  double kept = total;
  if (draw.top_p < 1) {
    std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    size_t count = 0;
    kept = 0;
    while (count < candidates.size() && kept < draw.top_p * total)
      kept += candidates[count++].first;
    candidates.resize(std::max<size_t>(1, count));
  }
  double left = draw.uniform * kept;
  for (const auto& [weight, id] : candidates) {
    left -= weight;
    if (left < 0) return id;
  }
  return candidates.back().second;  // rounding of the sum
}

}  // namespace icecache
