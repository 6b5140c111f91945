// PointAssigner: which centroids are nearest to which points, many small sets at a time: the bulk
// of packing (packing.h). On the CPU, or on a GPU that has just prefilled the layer (gpu/assign.h).
//
// One thread. Implementations agree but for rounding (the CPU's centroids have seven bits, a GPU's
// are f32), in which near ties may fall differently.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/status.h"
#include "kernels/byte_points.h"

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
inline constexpr uint32_t kAssignFewMax = kNearestFewMax;

class PointAssigner {
 public:
  virtual ~PointAssigner() = default;
  // The points of the tasks to come, alive until the next Load or the end; all of a table (ids is
  // null). RESOURCE_EXHAUSTED.
  virtual Status Load(const BytePoints& points, size_t count) = 0;
  // Fills best and score of all tasks. An error (of a GPU) leaves them undefined.
  virtual Status Assign(std::span<const AssignTask> tasks) = 0;
};

// Integer products (byte_points.h); never fails.
std::unique_ptr<PointAssigner> MakeCpuAssigner();

}  // namespace icecache
