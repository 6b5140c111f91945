#include "kernels/point_assigner.h"

#include "kernels/byte_points.h"

namespace icecache {
namespace {

class CpuAssigner final : public PointAssigner {
 public:
  Status Load(const BytePoints& points, size_t /*count*/) override {
    points_ = points;
    return OkStatus();
  }
  Status Assign(std::span<const AssignTask> tasks) override {
    for (const AssignTask& task : tasks) {
      points_.ids = task.rows.data();
      panels_.Assign(task.centroids, task.count, points_.dim);
      if (task.few == 1) {
        Nearest(panels_, points_, task.rows.size(), task.best, task.score);
      } else {
        NearestFew(panels_, points_, task.rows.size(), task.few, task.best);
      }
    }
    return OkStatus();
  }

 private:
  BytePoints points_;
  BytePanels panels_;
};

}  // namespace

std::unique_ptr<PointAssigner> MakeCpuAssigner() { return std::make_unique<CpuAssigner>(); }

}  // namespace icecache
