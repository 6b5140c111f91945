// Two-means over the few points of a page or a super: how a ClusterTree that grows divides them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/packing.h"

namespace icecache::cluster_tree {

// Points on two sides, each nearer to the mean of its own in the basis' metric. Keeps its memory
// from run to run; one thread.
struct Division {
  std::vector<uint8_t> side;  // 0 or 1, of each point; both occur
  uint32_t sizes[2] = {0, 0};
  std::vector<float> mean[2];
  float gain = 0;  // by how much the sums of squares of the sides are less than that of all

  // points[count, dim], count >= 2. Cost: at most six passes over them.
  void Run(const packing::Basis& basis, const float* points, uint32_t count);

 private:
  uint32_t Farthest(const packing::Basis& basis, const float* points, uint32_t count,
                    const float* from) const;
  bool Assign(const packing::Basis& basis, const float* points, uint32_t count);
  void Move(const float* points, uint32_t count);
  std::vector<float> line_;   // from one mean to the other, in the metric
  std::vector<float> along_;  // of each point, its product with that
};

}  // namespace icecache::cluster_tree
