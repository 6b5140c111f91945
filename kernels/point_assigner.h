// PointAssigner: which centroids are nearest to which points, many small sets at a time: the bulk
// of packing (packing.h). On the CPU, or on a GPU that has just prefilled the layer (gpu/assign.h).
//
// One thread. Implementations agree but for rounding, in which near ties may fall differently.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/status.h"

namespace icecache {

// Some points and the centroids they may be near to.
struct AssignTask {
  std::span<const uint32_t> rows;    // of the points
  const float* centroids = nullptr;  // [count, dim]
  uint32_t count = 0;                // >= 1
  uint32_t few = 1;                  // 1..count; at most kAssignFewMax
  uint32_t* best = nullptr;  // [rows, few]: the nearest, nearest first, the lowest of equals
  float* score =
      nullptr;  // [rows], x.c - |c|^2 / 2 of the nearest; null: not wanted; REQUIRES: few == 1
};
inline constexpr uint32_t kAssignFewMax = 16;

class PointAssigner {
 public:
  virtual ~PointAssigner() = default;
  // The points of the tasks to come: x[count, dim], alive until the next Load or the end; dim is a
  // multiple of 16. RESOURCE_EXHAUSTED.
  virtual Status Load(std::span<const float> x, uint32_t dim) = 0;
  // Fills best and score of all tasks. An error (of a GPU) leaves them undefined.
  virtual Status Assign(std::span<const AssignTask> tasks) = 0;
};

// Runs near the peak of one core's fused multiply-adds (nearest.h); never fails.
std::unique_ptr<PointAssigner> MakeCpuAssigner();

}  // namespace icecache
