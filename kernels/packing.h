// Packing: which tokens of a slice share a page, and which pages a super, so that pages hold tokens
// alike. Computed where a slice is built: by the server's ClusterTree, or by the worker that has
// just prefilled the layer and proposes the result to the server (docs/adr/0017).
//
// Coordinates: z_j = (k_j - mean_j) / scale_j, clamped. A logit is q . k = q . mean + sum_j (q_j
// scale_j) z_j. The metric weighs z_j^2 by weight_j = E[q_j^2] scale_j^2 (mean 1): the squared
// distance of two keys is then the variance of their logit difference, up to one factor for the
// whole slice. head_dim is a multiple of 16 throughout. Any thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/limits.h"
#include "common/page_layout.h"
#include "kernels/paged_kv.h"
#include "kernels/point_assigner.h"

namespace icecache::packing {

inline constexpr uint32_t kPageRows = limits::kPageTokens;
// Dimensions that a sketch sees: all of a small head, half of which hides what tells a few tokens
// from all others (docs/index.md), those in which logits vary most of a larger one.
inline constexpr uint32_t kSketchDims = 32, kSketchDimsMax = 64;
constexpr uint32_t SketchDims(uint32_t head_dim) {
  return head_dim <= kSketchDimsMax ? head_dim : kSketchDims;
}
inline constexpr float kCoordinateMax = 100.0f;  // |z| saturates; the rows themselves stay exact
inline constexpr float kValueShare = 0.3f;       // of the key variance, where values take part

// What a build learns about the slice; fixed until the next build (or rebase of a young slice).
struct Basis {
  uint64_t tokens = 0;                // rows it was derived from
  std::vector<float> energy;          // [dim] of the queries, from BuildHints; empty when unknown
  std::vector<float> mean, scale;     // [dim]
  std::vector<float> inverse;         // [dim] of scale
  std::vector<float> weight;          // [dim], of the metric
  std::vector<float> value_mean;      // [dim]
  std::vector<float> page_variance;   // [dim], of z within a page, mean over pages
  std::vector<uint32_t> sketch_dims;  // SketchDims dimensions, or none: no sketch
  float page_spread = 0;  // mean over pages of sum_j weight_j var_j: the unit of insert_slack

  bool sketched() const { return !sketch_dims.empty(); }
};

// Whether tokens are sketched; kAuto: where it pays.
enum class SketchUse : uint8_t { kAuto = 0, kOn = 1, kOff = 2 };

// packing_basis.cc
void ToCoordinates(const Basis& basis, const float* k, float* z);
// mean[j] over rows[count, dim] and, unless null, deviation[j] = sum of (x - mean)^2.
void Moments(const float* rows, uint32_t count, uint32_t dim, float* mean, float* deviation);
// Mean, scale and metric from a sample of the rows. query_energy: [head_dim], or empty.
Basis BasisOf(const TokenRows& rows, std::span<const float> query_energy);
// The same from sample rows k[count, dim], v[count, dim]; basis->energy is set.
void LearnBasis(const float* k, const float* v, uint32_t count, uint32_t dim, Basis* basis);
// page_variance, page_spread and the sketch's dimensions from the pages of a layout (a sample of
// them).
void LearnPages(const TokenRows& rows, const Packing& packing, SketchUse sketch, Basis* basis);
// Share of the values' variance that is left inside pages, on a sample of them; at most 1.
double ValueSpread(const TokenRows& rows, const Packing& packing);

// packing.cc
Packing PackSequential(uint32_t count);
// value_share > 0: distances also count values, scaled to that share of the keys' variance. Errors
// are the assigner's.
Result<Packing> PackContent(const TokenRows& rows, const Basis& basis, float value_share,
                            uint64_t seed, PointAssigner& assigner);
// Of a policy's seed and that of its hints. Not their exclusive or: a slice gives both the same
// seed, and all slices would share one sequence.
inline uint64_t BuildSeed(uint64_t policy_seed, uint64_t hint_seed) {
  return policy_seed + 0x9e3779b97f4a7c15ull * hint_seed;
}
// The layout by content that a slice's ClusterTree would consider by itself: by keys, and by values
// too where tokens will be sketched. slice_seed: SliceSeed. A few us per token.
Result<Packing> Propose(const TokenRows& rows, std::span<const float> query_energy,
                        uint64_t slice_seed, PointAssigner& assigner);

}  // namespace icecache::packing
