// PointAssigner on a Device: points go there once per Load, a batch of tasks is one launch.
#pragma once

#include <memory>

#include "kernels/gpu/device.h"
#include "kernels/point_assigner.h"

namespace icecache::gpu {

// Borrows the device. Memory there: the points (4 bytes per point and dimension), the centroids of
// a batch, and 4 to 8 bytes per point and centroid that is asked for.
std::unique_ptr<PointAssigner> MakeGpuAssigner(Device& device);

}  // namespace icecache::gpu
