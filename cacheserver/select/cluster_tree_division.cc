#include "cacheserver/select/cluster_tree_division.h"

#include <algorithm>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {

constexpr int kPasses = 4;

float SquaredDistance(const packing::Basis& basis, const float* a, const float* b) {
  float lanes[16] = {};
  for (size_t j = 0; j < basis.weight.size(); j += 16) {
    for (size_t i = 0; i < 16; ++i) {
      const float x = a[j + i] - b[j + i];
      lanes[i] += basis.weight[j + i] * x * x;
    }
  }
  return Sum16(lanes);
}

}  // namespace

uint32_t Division::Farthest(const packing::Basis& basis, const float* points, uint32_t count,
                            const float* from) const {
  uint32_t best = 0;
  float most = -1;
  for (uint32_t i = 0; i < count; ++i) {
    const float distance = SquaredDistance(basis, points + i * basis.weight.size(), from);
    if (distance <= most) continue;
    most = distance;
    best = i;
  }
  return best;
}

// Every point goes to the nearer mean; whether one changed sides.
bool Division::Assign(const packing::Basis& basis, const float* points, uint32_t count) {
  const size_t dim = basis.weight.size();
  line_.resize(dim);
  float middle = 0;
  for (size_t j = 0; j < dim; ++j) {
    line_[j] = basis.weight[j] * (mean[1][j] - mean[0][j]);
    middle += 0.5f * line_[j] * (mean[1][j] + mean[0][j]);
  }
  along_.resize(count);
  DotRows(line_.data(), 1, reinterpret_cast<const std::byte*>(points), DType::kF32, count,
          static_cast<uint32_t>(dim), along_.data(), count);
  bool changed = false;
  sizes[0] = sizes[1] = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const uint8_t to = along_[i] > middle ? 1 : 0;
    changed = changed || to != side[i];
    side[i] = to;
    ++sizes[to];
  }
  return changed;
}

void Division::Move(const float* points, uint32_t count) {
  const size_t dim = mean[0].size();
  for (auto& m : mean) std::fill(m.begin(), m.end(), 0.0f);
  for (uint32_t i = 0; i < count; ++i) {
    const float share = 1.0f / static_cast<float>(sizes[side[i]]);
    float* const to = mean[side[i]].data();
    const float* const point = points + i * dim;
    for (size_t j = 0; j < dim; ++j) to[j] += share * point[j];
  }
}

void Division::Run(const packing::Basis& basis, const float* points, uint32_t count) {
  const size_t dim = basis.weight.size();
  const float* one = points + Farthest(basis, points, count, points) * dim;
  const float* two = points + Farthest(basis, points, count, one) * dim;
  mean[0].assign(one, one + dim);
  mean[1].assign(two, two + dim);
  side.assign(count, 2);
  for (int pass = 0; pass < kPasses && Assign(basis, points, count); ++pass) {
    if (sizes[0] == 0 || sizes[1] == 0) {  // all points equal
      for (uint32_t i = 0; i < count; ++i) side[i] = i < count / 2 ? 0 : 1;
      sizes[0] = count / 2;
      sizes[1] = count - sizes[0];
      Move(points, count);
      break;
    }
    Move(points, count);
  }
  gain = SquaredDistance(basis, mean[0].data(), mean[1].data()) * static_cast<float>(sizes[0]) *
         static_cast<float>(sizes[1]) / static_cast<float>(count);
}

}  // namespace icecache::cluster_tree
